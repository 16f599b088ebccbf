"""Evaluation: what a policy is worth on text it was not trained on, and what several checkpoints are worth, compared."""

from components.evaluation.calibration import Calibration, block_losses
from components.evaluation.candidates import Candidate, check_candidates, find_candidates
from components.evaluation.measures import (
    CrossEntropy,
    Found,
    Measure,
    NothingToMeasure,
    Row,
    TokenEntropy,
    row_groups,
    run_measure,
)
from components.evaluation.results import (
    forget_found,
    load_scores,
    load_summary,
    save_found,
    save_summary,
    summarise,
)
from components.evaluation.schema import check_evaluation
from components.evaluation.statistics import Difference, Estimate, Scores, compare, pass_at_k
from components.evaluation.tasks import Completions, Translation
from components.evaluation.validation import (
    Measured,
    forget_validations,
    load_validations,
    merge,
    save_validation,
    validate,
)

__all__ = [
    "Calibration",
    "Candidate",
    "Completions",
    "CrossEntropy",
    "Difference",
    "Estimate",
    "Found",
    "Measure",
    "Measured",
    "NothingToMeasure",
    "Row",
    "Scores",
    "TokenEntropy",
    "Translation",
    "block_losses",
    "check_candidates",
    "check_evaluation",
    "compare",
    "find_candidates",
    "forget_found",
    "forget_validations",
    "load_scores",
    "load_summary",
    "load_validations",
    "merge",
    "pass_at_k",
    "row_groups",
    "run_measure",
    "save_found",
    "save_summary",
    "save_validation",
    "summarise",
    "validate",
]
