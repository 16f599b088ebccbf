"""Coding problems from CodeI/O, whose rows hold a question, a program that answers it and a generator of its inputs.

Li et al., "CodeI/O: Condensing Reasoning Patterns via Code Input-Output Prediction", arXiv 2502.07316; here in the form
of the data file of the PyPI package ``reasoning-gym``.
"""

import ast
import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from components.prepare.execution import ProgramRunner, evaluate, impurity
from components.prepare.problems import MAX_COMPLETION, MAX_PROMPT, MAX_TESTS, Problem

_FUNCTION = "main_solution"
# Comments that are the same in every program, and instructions to the model that wrote it.
_BOILERPLATE = re.compile(
    r"^[ \t]*# (?:import necessary packages|main function|all class and function definitions|they will be used in|"
    r"all input arguments of the main_solution|return, the returned value must be json).*\n",
    re.MULTILINE | re.IGNORECASE,
)
_INPUTS = "[generate_inputs(Random(seed)) for seed in range({count})]"


def read_codeio(path: Path, *, runner: ProgramRunner, dropped: Counter[str]) -> list[Problem]:
    """Problems of a CodeI/O file whose programs are pure computation, with inputs drawn by their own generators.

    Args:
        path: of ``codeio.jsonl.gz``.
        runner: runs the generators of inputs.
        dropped: counts the rows left out, by reason.
    """
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line, row in enumerate(map(json.loads, file)):
            code = clean(row["code_sample"])
            found = impurity(code) or impurity(row["input_generator"])
            if found is not None:
                dropped["program needs a package, a file, the clock or a terminal"] += 1
            elif len(code) > MAX_COMPLETION or len(row["task_description"] + row["input_output_spec"]) > MAX_PROMPT:
                dropped[f"prompt longer than {MAX_PROMPT} or answer longer than {MAX_COMPLETION} characters"] += 1
            else:
                rows.append((line, code, row))
    inputs = _draw_inputs([(code, row["input_generator"]) for _, code, row in rows], runner)
    problems = []
    for (line, code, row), examples in zip(rows, inputs, strict=True):
        if examples:
            problems.append(
                Problem(
                    id=f"codeio.{line}",
                    group=f"codeio.{line}",
                    origin="reasoning_gym",
                    name=_FUNCTION,
                    signature=_signature(code),
                    description=f"{row['task_description'].strip()}\n\n{row['input_output_spec'].strip()}",
                    code=code,
                    examples=dict.fromkeys(examples),
                )
            )
        else:
            dropped["generator of inputs fails, or gives other than plain and repeatable values"] += 1
    return problems


def clean(code: str) -> str:
    """A program without boilerplate comments and without imports that nothing in it uses."""
    code = _BOILERPLATE.sub("", code)
    tree = ast.parse(code)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = code.splitlines()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if node.lineno == node.end_lineno and not names & used:
                lines[node.lineno - 1] = ""
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines).strip()) + "\n"


def _draw_inputs(cases: Sequence[tuple[str, str]], runner: ProgramRunner) -> list[list[str]]:
    """Calls of each program with inputs from its generator, without repetitions."""
    expression = _INPUTS.format(count=2 * MAX_TESTS)
    programs = [(f"{code}\nfrom random import Random\n{generator}", [expression]) for code, generator in cases]
    calls = []
    for values in evaluate(programs, runner=runner):
        drawn = json.loads(values[expression].json) if expression in values else []
        arguments = (", ".join(f"{name}={value!r}" for name, value in inputs.items()) for inputs in drawn)
        calls.append(list(dict.fromkeys(f"{_FUNCTION}({listed})" for listed in arguments)))
    return calls


def _signature(code: str) -> str:
    (function,) = [
        node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == _FUNCTION
    ]
    return f"{_FUNCTION}({ast.unparse(function.args)})"
