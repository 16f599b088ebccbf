"""The verifier that runs code: does a completion do what its record's tests say?

Generated code and what it is judged by never meet in one process. The code's process is asked for values and can only state
them; the expected ones stay here. Asserts, which are code themselves, run in a second sandbox, for which this file carries
arguments and values back and forth as lines of text.
"""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

from components.rewards.process import Process
from components.rewards.sandbox import Sandbox
from components.rewards.verifiers import same_value

Score = Literal["fraction", "all"]

PASSED = b"PASSED"  # as guest.py writes it
FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[ \t]*$", re.MULTILINE)


class UnitTests:
    """Runs each completion behind its record's ``context`` and counts the tests that pass.

    A record has ``tests``, a list of ``{"expression": "f(2)", "expected": "[1, 4]"}`` with JSON as the expected value; or
    ``check``, Python code that defines ``check(candidate)`` with asserts, and ``entry_point``, the function's name. A check
    is one test, and gets copies: a function that only changes its arguments cannot be checked so. Tuples count as lists. What
    does not compile is left out from the first statement at the margin that does not, with all that follows.

    It warns, once, when more than half of the programs of a call run out of time.

    Args:
        sandbox: where it runs. Its limits are for all tests of one completion.
        score: ``fraction`` of the tests passed, or 1 only if ``all`` are.
        stop_sequences: where text without a fenced block is cut.
        tolerance: relative, of floats; absolute below 1.

    Raises:
        ValueError: an unknown ``score``; a record without tests (when called).
        SandboxError: programs can no longer be run (when called).
    """

    def __init__(
        self,
        *,
        sandbox: Sandbox,
        score: Score = "fraction",
        stop_sequences: Sequence[str] = ("\nclass ", "\nif __name__", "\nprint(", "\n```"),
        tolerance: float = 1e-6,
    ) -> None:
        if score not in get_args(Score):
            raise ValueError(f"score is {score!r}; choose one of {', '.join(get_args(Score))}")
        self.sandbox = sandbox
        self.score = score
        self.stop_sequences = list(stop_sequences)
        self.tolerance = tolerance

    def __call__(self, completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """Scores of ``completions``; equal ones for equal records are run once."""
        jobs = []
        for completion, record in zip(completions, records, strict=True):
            _require_tests(record)
            program = {
                "context": _with_plain_line_ends(record.get("context", "")),
                "candidates": candidates(completion, self.stop_sequences),
            }
            jobs.append((json.dumps(program), record))
        keys = [json.dumps([program, _judged_by(record)]) for program, record in jobs]
        distinct = dict(zip(keys, jobs, strict=True))
        outcomes = dict(zip(distinct, self.sandbox.spread(self._outcome, distinct.values()), strict=True))
        if 2 * sum(late for _, late in outcomes.values()) > len(outcomes):
            warnings.warn(
                "more than half of the programs that UnitTests ran at once were out of time and count as wrong; if right ones "
                "are among them, raise cpu_seconds and wall_seconds of the sandbox, or lower its workers",
                stacklevel=2,
            )
        shares = [outcomes[key][0] for key in keys]
        return shares if self.score == "fraction" else [float(share == 1) for share in shares]

    def _outcome(self, job: tuple[str, dict[str, Any]]) -> tuple[float, bool]:
        """Share of the tests that a program passes, and whether it ran out of time."""
        program, record = job
        if record.get("tests"):
            passed, late = self._count(program, record["tests"])
            return passed / len(record["tests"]), late
        return self._check(program, record)

    def _count(self, program: str, tests: list[dict[str, str]]) -> tuple[int, bool]:
        passed = 0
        with self.sandbox.start("serve", program) as solution:
            for test in tests:
                solution.tell(json.dumps({"expression": test["expression"]}).encode())
                reply = solution.hear()
                if reply is None:
                    return passed, _is_late(solution)
                passed += self._is_right(reply, test["expected"])
        return passed, False

    def _is_right(self, reply: bytes, expected: str) -> bool:
        try:
            stated = json.loads(reply)
            return stated.keys() == {"value"} and same_value(stated["value"], json.loads(expected), self.tolerance)
        except (AttributeError, ValueError, RecursionError):  # it may have written anything
            return False

    def _check(self, program: str, record: dict[str, Any]) -> tuple[float, bool]:
        asserts = {
            # Asserts may use what stands before the function that they are about.
            "context": context if _is_whole(context := record.get("context", "")) else "",
            "check": record["check"],
            "entry_point": record["entry_point"],
        }
        start = self.sandbox.start
        with start("serve", program) as solution, start("check", json.dumps(asserts)) as checker:
            while (line := checker.hear()) not in (None, PASSED):
                solution.tell(line)
                reply = solution.hear()
                if reply is None:
                    return 0.0, _is_late(solution)
                checker.tell(reply)
            return (1.0, False) if line == PASSED else (0.0, _is_late(checker))


def candidates(completion: str, stop_sequences: Sequence[str] = ()) -> list[str]:
    """What of a completion may be its code, as it stands behind the context; the first that compiles there is it.

    If the completion's first fence opens a block (it says ``python``, or nothing stands before it), that block is the code.
    Otherwise the text is, up to a stop sequence: a fence in it ends the block that the prompt began. If that is no code but
    prose, the block of a fence that says nothing is.
    """
    completion = _with_plain_line_ends(completion)
    ends = [completion.find(stop) for stop in stop_sequences if stop in completion]
    text = completion[: min(ends, default=None)] + "\n"
    fence = FENCE.search(completion)
    if fence is None:
        return [text]
    block = f"\n{FENCE.split(completion[fence.end() :], maxsplit=1)[0]}\n"
    if fence[1].lower() in ("python", "python3", "py") or not completion[: fence.start()].strip():
        return [block]
    return [text] if fence[1] else [text, block]


def _with_plain_line_ends(text: str) -> str:
    return re.sub("\r\n?", "\n", text)  # as Python reads source


def _is_late(process: Process) -> bool:
    return process.wait().status == "timeout"


def _judged_by(record: dict[str, Any]) -> list[Any]:
    return [record.get(name) for name in ("tests", "check", "entry_point", "context")]


def _is_whole(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _require_tests(record: dict[str, Any]) -> None:
    if not record.get("tests") and not (record.get("check") and record.get("entry_point")):
        raise ValueError(
            f"record {record.get('id')!r} has neither 'tests' nor 'check' and 'entry_point'; prepare it with tests, or choose "
            "another verifier"
        )
    for number, test in enumerate(record.get("tests") or []):
        try:
            json.loads(test["expected"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"tests[{number}] of record {record.get('id')!r} is not an expression and an expected value as JSON text "
                f"({error!r}); prepare the records again"
            ) from error
