"""What reference code computes: run in isolation, twice, and kept only where both runs agree on a plain value.

The second run has another hash seed and asks in the opposite order, so that a value which depends on the order of a set
or on an earlier call differs. It sees another time of day, too; what reads the clock is refused before it runs.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

# Modules that compute, and touch nothing outside the process.
_PURE = """
    abc base64 binascii bisect calendar cmath collections colorsys contextlib copy dataclasses datetime decimal difflib
    enum fractions functools hashlib heapq html itertools json keyword math numbers operator pprint queue random re
    reprlib statistics string struct textwrap typing types unicodedata warnings zlib
"""
_PURE_MODULES = frozenset(_PURE.split())
_IMPURE_NAMES = {"breakpoint", "compile", "eval", "exec", "exit", "globals", "input", "open", "quit", "__import__"}
_CLOCKS = {"now", "today", "utcnow"}

# Runs under the sandbox's interpreter, whose hash seed is random, and starts itself again with the one asked for.
_PROGRAM = """
import os, sys
os.execve(sys.executable, [sys.executable, "-s", "-S", "-P", "-c", {harness!r}], {{"PYTHONHASHSEED": "{seed}"}})
"""
_HARNESS = """
import io, json, math, sys

def is_plain(value):
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, str)

stdout, sys.stdout = sys.stdout, io.StringIO()
namespace = {{"__name__": "reference"}}
exec({code!r}, namespace)
values = {{}}
for expression in {expressions!r}:
    try:
        value = eval(expression, namespace)
        if is_plain(value):
            values[expression] = [json.dumps(value), repr(value)]
    except Exception:
        pass
stdout.write(json.dumps(values))
"""

_LIMITS = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
"""


@dataclass(frozen=True, kw_only=True)
class Value:
    """What an expression evaluated to: as JSON text, in which a tuple is a list, and as ``repr`` wrote it."""

    json: str
    repr: str


class Finished(Protocol):
    """What is read of a program that ended."""

    returncode: int
    stdout: str


class ProgramRunner(Protocol):
    """Runs Python programs in isolation; ``components.rewards.sandbox.Sandbox`` is one."""

    def map(self, programs: Sequence[str]) -> Sequence[Finished]:
        """One result per program, in their order."""
        ...


def evaluate(cases: Sequence[tuple[str, Sequence[str]]], *, runner: ProgramRunner) -> list[dict[str, Value]]:
    """Values of expressions behind code.

    Args:
        cases: pairs of code that defines what its expressions use, and those expressions.
        runner: where they run.

    Returns:
        Per case the expressions whose value is plain (None, booleans, strings, finite numbers; lists, tuples, and
        dictionaries with strings as keys, of such) and the same in both runs.
    """
    orders = [(code, list(expressions)) for code, expressions in cases]
    forward = [_program(code, expressions, seed=1) for code, expressions in orders]
    backward = [_program(code, expressions[::-1], seed=2) for code, expressions in orders]
    results = [_values(result) for result in runner.map(forward + backward)]
    pairs = zip(results[: len(orders)], results[len(orders) :], strict=True)
    return [
        {expression: value for expression, value in one.items() if other.get(expression) == value}
        for one, other in pairs
    ]


def _program(code: str, expressions: Sequence[str], *, seed: int) -> str:
    return _PROGRAM.format(harness=_HARNESS.format(code=code, expressions=list(expressions)), seed=seed)


def _values(result: Finished) -> dict[str, Value]:
    if result.returncode != 0:
        return {}
    found: dict[str, Any] = json.loads(result.stdout)
    return {expression: Value(json=text, repr=shown) for expression, (text, shown) in found.items()}


def impurity(code: str) -> str | None:
    """The first import or name by which code could reach beyond its own computation, or None; not a security measure."""
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "." * node.level]
        for name in names:
            if name.split(".")[0] not in _PURE_MODULES:
                return name
        if isinstance(node, ast.Name) and node.id in _IMPURE_NAMES:
            return node.id
        if isinstance(node, ast.Attribute) and node.attr in _CLOCKS:
            return node.attr
    return None


class Subprocesses:
    """Python programs as plain child processes: bounded in time, memory and files, but not isolated."""

    def __init__(self, *, seconds: float = 10.0) -> None:
        self.seconds = seconds

    def map(self, programs: Sequence[str]) -> list[subprocess.CompletedProcess[str]]:
        """One result per program, in their order; one that takes too long has the return code -1."""
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self._run, programs))

    def _run(self, program: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", _LIMITS + program]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=self.seconds, cwd="/", env={}, check=False
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, -1, "", "")
