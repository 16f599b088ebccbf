"""How many programs a second the sandbox runs, and how many completions a second are verified.

    python -m benchmarks.verifiers --workers 1 2 --json verifiers.json

Three loads: a script that does nothing, a completion with three expressions to evaluate (one process), and one with
HumanEval's kind of ``check`` (two processes, which talk). Every run is a new process, so what is measured is mostly the
start of interpreters. Printed: runs per second, and of the script how long one takes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from components.rewards import Sandbox, UnitTests

SOLUTION = "def f(x):\n    return x * x\n"
TESTS = {"tests": [{"expression": f"f({x})", "expected": str(x * x)} for x in range(3)]}
CHECK = {
    "entry_point": "f",
    "check": "def check(candidate):\n" + "".join(f"    assert candidate({x}) == {x * x}\n" for x in range(3)),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=50, help="of each load")
    parser.add_argument("--repeats", type=int, default=3, help="the median of which is taken")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()

    rows = [measure(workers, args.runs, args.repeats) for workers in args.workers]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(f"{value:.4g}" for value in row.values()))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(workers: int, runs: int, repeats: int) -> dict[str, float]:
    """One row of the table."""
    sandbox = Sandbox(workers=workers)
    verifier = UnitTests(sandbox=sandbox)
    seconds: list[float] = []

    def scripts() -> None:
        seconds.extend(result.seconds for result in sandbox.map(["pass"] * runs))

    def verified(record: dict[str, Any]) -> Callable[[], None]:
        completions = [f"{SOLUTION}# {i}\n" for i in range(runs)]  # equal ones would run once
        return lambda: check_all(verifier(completions, [record] * runs))

    loads = {"scripts_per_second": scripts, "tests_per_second": verified(TESTS), "checks_per_second": verified(CHECK)}
    rates = {name: runs / statistics.median(timed(load) for _ in range(repeats)) for name, load in loads.items()}
    return {"workers": workers, **rates, "milliseconds_a_script": 1000 * statistics.median(seconds)}


def check_all(scores: list[float]) -> None:
    """A benchmark of failures would measure something else."""
    assert scores == [1.0] * len(scores)


def timed(function: Callable[[], None]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
