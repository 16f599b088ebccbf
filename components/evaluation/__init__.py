"""Evaluation: what a policy is worth on text it was not trained on."""

from components.evaluation.validation import (
    Measured,
    forget_validations,
    load_validations,
    merge,
    save_validation,
    validate,
)

__all__ = ["Measured", "forget_validations", "load_validations", "merge", "save_validation", "validate"]
