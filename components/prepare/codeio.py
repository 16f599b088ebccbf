"""Coding problems from CodeI/O, whose rows hold a question, a program that answers it and a generator of its inputs.

Li et al., "CodeI/O: Condensing Reasoning Patterns via Code Input-Output Prediction", arXiv 2502.07316; here in the form
of the data file of the PyPI package ``reasoning-gym``.
"""

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.prepare.execution import evaluate, impurity
from components.prepare.problems import MAX_TESTS, Problem
from components.prepare.source import SourceModule

if TYPE_CHECKING:
    from components.rewards import Sandbox

_FUNCTION = "main_solution"
_INPUTS = "[generate_inputs(Random(seed)) for seed in range({count})]"


def read_codeio(path: Path, *, sandbox: "Sandbox", dropped: Counter[str]) -> list[Problem]:
    """Problems of a CodeI/O file whose programs are pure computation, with inputs drawn by their own generators.

    Args:
        path: of ``codeio.jsonl.gz``.
        sandbox: runs the generators of inputs.
        dropped: counts the rows left out, by reason.
    """
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line, row in enumerate(map(json.loads, file)):
            module = SourceModule(f"{row['code_sample']}\n\n\n{row['input_generator']}\n")
            solution, generator = module.function(_FUNCTION), module.function("generate_inputs")
            code, drawing = module.stand_alone(solution), module.stand_alone(generator)
            if not module.only_defines():
                dropped["has statements outside functions"] += 1
            elif code is None or drawing is None:
                dropped["needs another package or module"] += 1
            elif impurity(code) or impurity(drawing):
                dropped["needs files, the clock, chance or a terminal"] += 1
            else:
                rows.append((line, row, module.signature(solution), code, drawing))
    inputs = _draw_inputs([drawing for *_, drawing in rows], sandbox)
    problems = []
    for (line, row, signature, code, _), examples in zip(rows, inputs, strict=True):
        if examples:
            problems.append(
                Problem(
                    id=f"codeio.{line}",
                    group=f"codeio.{line}",
                    origin="reasoning_gym",
                    signature=signature,
                    description=f"{row['task_description'].strip()}\n\n{row['input_output_spec'].strip()}",
                    code=code,
                    examples=dict.fromkeys(examples),
                )
            )
        else:
            dropped["generator of inputs fails, or gives other than plain and repeatable values"] += 1
    return problems


def _draw_inputs(generators: Sequence[str], sandbox: "Sandbox") -> list[list[str]]:
    """Calls with inputs from each generator, without repetitions; none if it fails."""
    expression = _INPUTS.format(count=2 * MAX_TESTS)
    programs = [(f"from random import Random\n{generator}", [expression]) for generator in generators]
    calls = []
    for values in evaluate(programs, sandbox=sandbox):
        drawn = json.loads(values[expression].json) if expression in values else []
        arguments = (", ".join(f"{name}={value!r}" for name, value in inputs.items()) for inputs in drawn)
        calls.append(list(dict.fromkeys(f"{_FUNCTION}({listed})" for listed in arguments)))
    return calls
