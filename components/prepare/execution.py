"""What reference code computes: run in isolation, twice, and believed only if both runs agree.

The second run has another hash seed and asks in the opposite order, so that a value which depends on the order of a set
or on an earlier call differs. What reads the clock or draws at random could agree by chance; it is refused before it runs.
"""

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a corpus without code to run should not wait for torch, nor should --help
    from components.rewards import Result, Sandbox

# Modules that compute, and touch nothing outside the process.
_PURE = """
    abc base64 binascii bisect calendar cmath collections colorsys contextlib copy dataclasses datetime decimal difflib
    enum fractions functools hashlib heapq html itertools json keyword math numbers operator pprint queue re
    reprlib statistics string struct textwrap typing types unicodedata warnings zlib
"""
_PURE_MODULES = frozenset(_PURE.split())
_IMPURE_NAMES = {"breakpoint", "compile", "eval", "exec", "exit", "globals", "input", "open", "quit", "__import__"}
_CLOCKS = {"now", "today", "utcnow"}

# The sandbox's interpreter has a hash seed of its own, so it starts another for each run.
_PROGRAM = """
import os, sys
for seed, harness in {runs!r}:
    command = [sys.executable, "-s", "-S", "-P", "-c", harness]
    if os.spawnve(os.P_WAIT, sys.executable, command, {{"PYTHONHASHSEED": seed}}):
        sys.exit(1)
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
print(json.dumps(values), file=stdout)
"""


@dataclass(frozen=True, kw_only=True)
class Value:
    """What an expression evaluated to: as JSON text, in which a tuple is a list, and as ``repr`` wrote it."""

    json: str
    repr: str


def evaluate(cases: Sequence[tuple[str, Sequence[str]]], *, sandbox: "Sandbox") -> list[dict[str, Value]]:
    """Values of expressions behind code.

    Args:
        cases: pairs of code that defines what its expressions use, and those expressions.
        sandbox: where they run.

    Returns:
        Per case the expressions whose value is plain: None, booleans, strings, finite numbers; lists, tuples, and
        dictionaries with strings as keys, of such. None at all if any differs between the runs: others of that code may
        have been the same by chance.
    """
    results = sandbox.map(_program(code, list(expressions)) for code, expressions in cases)
    return [_agreed(result) for result in results]


def _program(code: str, expressions: list[str]) -> str:
    orders = {"1": expressions, "2": expressions[::-1]}  # by hash seed
    runs = [(seed, _HARNESS.format(code=code, expressions=order)) for seed, order in orders.items()]
    return _PROGRAM.format(runs=runs)


def _agreed(result: "Result") -> dict[str, Value]:
    """The values, if the two lines of output state the same ones."""
    if result.status != "ok":
        return {}
    one, other = map(json.loads, result.stdout.splitlines())
    return {name: Value(json=text, repr=shown) for name, (text, shown) in one.items()} if one == other else {}


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
