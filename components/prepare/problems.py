"""A coding problem from whatever source, and the record it becomes once its reference answer has been run."""

import doctest
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from components.prepare.corpus import Row
from components.prepare.execution import Value, evaluate

if TYPE_CHECKING:
    from components.rewards import Sandbox

# In characters; what is longer is left out.
MAX_PROMPT = 2000
MAX_COMPLETION = 3000
MAX_TEST = 500
MAX_TESTS = 8

_TASK = "Write a Python function `{signature}`.\n\n{description}\n"
_EXAMPLE = "\nFor example, `{expression}` returns `{value}`.\n"
_ANSWER = "```python\n{code}```"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A function to write, and calls of it.

    Attributes:
        id: unique in the corpus.
        group: what the split keeps together.
        origin: the package it comes from.
        signature: as the prompt gives it.
        description: what it has to do.
        code: the reference answer, which stands alone.
        examples: expressions, and what the documentation says they show, if it says so.
    """

    id: str
    group: str
    origin: str
    signature: str
    description: str
    code: str
    examples: Mapping[str, str | None]


def make_records(problems: Sequence[Problem], *, sandbox: "Sandbox", dropped: Counter[str]) -> list[Row]:
    """Records of the problems whose reference answer was seen to give plain, repeatable and telling values.

    Where two or more examples are usable, the prompt shows the first, which is then not tested: what is tested is never
    shown, so an answer cannot repeat it.

    Args:
        problems: in the order of the records.
        sandbox: runs the reference answers.
        dropped: counts what is left out, by reason.
    """
    outcomes = evaluate([(problem.code, list(problem.examples)) for problem in problems], sandbox=sandbox)
    records = []
    for problem, values in zip(problems, outcomes, strict=True):
        record = _make_record(problem, values)
        if isinstance(record, str):
            dropped[record] += 1
        else:
            records.append(record)
    return records


def _make_record(problem: Problem, values: Mapping[str, Value]) -> Row | str:
    """The record, or why there is none."""
    repeatable = {
        expression: values[expression]
        for expression, documented in problem.examples.items()
        if expression in values and (documented is None or _agree(documented, values[expression]))
    }
    if not repeatable:
        return "no example gives a plain value, the same each time and as documented"
    short = [(call, value) for call, value in repeatable.items() if max(len(call), len(value.json)) <= MAX_TEST]
    if not short:
        return f"examples longer than {MAX_TEST} characters"
    short = short[:MAX_TESTS]
    if _constant_passes([value for _, value in short]):
        return "a constant passes all tests"
    prompt, answer = _TASK.format(signature=problem.signature, description=problem.description), problem.code
    if len(short) > 1 and not _constant_passes([value for _, value in short[1:]]):
        shown, value = short.pop(0)
        prompt += _EXAMPLE.format(expression=shown, value=value.repr)
    if len(prompt) > MAX_PROMPT or len(answer) > MAX_COMPLETION:
        return f"prompt longer than {MAX_PROMPT} or answer longer than {MAX_COMPLETION} characters"
    return {
        "id": problem.id,
        "group": problem.group,
        "origin": problem.origin,
        "prompt": prompt,
        "completion": _ANSWER.format(code=answer),
        "context": "",
        "tests": [{"expression": expression, "expected": value.json} for expression, value in short],
    }


def _agree(documented: str, value: Value) -> bool:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(documented, value.repr + "\n", flags)


def _constant_passes(values: Collection[Value]) -> bool:
    """Whether one value passes all tests, and is easily guessed: one of three, or repeated."""
    distinct = {value.json for value in values}
    return len(distinct) == 1 and (len(values) > 1 or distinct <= {"null", "true", "false"})
