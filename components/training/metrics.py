"""Numbers of a run: averaged over micro-batches and ranks, timed by phase, kept on disk line by line.

``metrics.jsonl`` in the output directory always holds every logged step, whatever metric logger YAML names besides: plots
and tables are made from it, and a resumed run cuts it back to the step it continues from.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from components.training import watchdog
from components.training.distributed import gather


class StepMetrics:
    """Collects one step: metrics of its micro-batches, and seconds per phase."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self._parts: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    def add(self, values: dict[str, float], weight: float) -> None:
        """Add a micro-batch's means, which stand for ``weight`` tokens or blocks."""
        for name, value in values.items():
            # A weight of 0 adds nothing, even if the value it comes with is not a number.
            self._sums[name] += value * weight if weight else 0.0
            self._weights[name] += weight

    def add_parts(self, values: dict[str, float]) -> None:
        """Add a micro-batch's parts of numbers that are already divided by the whole step's counts."""
        for name, value in values.items():
            self._parts[name] += value

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what runs inside as ``seconds/name``, and tell the watchdog."""
        start = time.perf_counter()
        with watchdog.phase(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self._seconds[name] += time.perf_counter() - start

    def mean(self) -> dict[str, float]:
        """Numbers of the step over micro-batches and ranks, and seconds per phase of this rank. What no token or block stood
        for is left out."""
        ranks = gather((dict(self._sums), dict(self._weights), dict(self._parts)))
        means: dict[str, float] = defaultdict(float)
        for _, _, parts in ranks:
            for name, value in parts.items():
                means[name] += value
        # A rank may lack what another has: a reward need not report on blocks that do not count.
        for name in dict.fromkeys(name for sums, _, _ in ranks for name in sums):
            weight = sum(weights.get(name, 0.0) for _, weights, _ in ranks)
            if weight:
                means[name] = sum(sums.get(name, 0.0) for sums, _, _ in ranks) / weight
        seconds = {f"seconds/{name}": value for name, value in self._seconds.items()}
        return means | seconds | {"seconds/step": time.perf_counter() - self._start}


class MetricsLog:
    """``metrics.jsonl``: one JSON object per logged step."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / "metrics.jsonl"

    def truncate(self, step: int) -> None:
        """Forget what was logged after ``step``."""
        kept = [row for row in read_metrics(self.path.parent) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def append(self, step: int, values: dict[str, float]) -> None:
        """Add one step; numbers that JSON cannot hold become null."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(run_dir: Path) -> list[dict]:
    """Every logged step of a run, oldest first; a line cut short by a crash ends it."""
    path = Path(run_dir) / "metrics.jsonl"
    rows: list[dict] = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
