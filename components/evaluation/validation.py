"""Validation during training: cross-entropy and the reward's measures, row by row, so that two checkpoints can be paired.

Every validation uses the same rows, the same anchors and the same uniform numbers, so the difference between two of them is
the difference between two policies. Results stand in ``validation/step_N.json`` of the output directory.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import NormalDist

import torch

from components.evaluation.statistics import LEVEL
from components.losses import learned_tokens
from components.models import Policy
from components.rollouts import NoRollouts, duplicate_share
from components.types import Batch, FeatureExtractor, Features, Generator, Reward, Rollouts


@dataclass
class Measured:
    """One metric over the validation rows: its mean in each row, how much (tokens or blocks) that mean is of, and what each row
    belongs to, such as a file; None if rows are independent, or were written before groups were known."""

    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    groups: list[str] | None = None

    def add(self, value: float, weight: float, group: str | None) -> None:
        """One more row; either all rows have a group or none has."""
        self.values.append(value)
        self.weights.append(weight)
        if group is not None:
            self.groups = self.groups or []
            self.groups.append(group)

    def rows(self) -> list[tuple[float, float, str | None]]:
        """What :meth:`add` was given."""
        groups = [None] * len(self.values) if self.groups is None else self.groups
        return list(zip(self.values, self.weights, groups, strict=True))

    def mean(self) -> float:
        """The mean over all tokens (or blocks)."""
        return math.fsum(v * w for v, w in zip(self.values, self.weights, strict=True)) / math.fsum(self.weights)

    def standard_error(self) -> float:
        """Standard error of :meth:`mean`, groups of rows being independent (linearised ratio estimator, residuals summed within
        groups); infinite for one group."""
        mean = self.mean()
        residuals: dict[str | int, float] = defaultdict(float)
        for row, (value, weight, group) in enumerate(self.rows()):
            residuals[row if group is None else group] += weight * (value - mean)
        G = len(residuals)
        if G < 2:
            return math.inf
        squares = math.fsum(residual**2 for residual in residuals.values())
        return math.sqrt(squares * G / (G - 1)) / math.fsum(self.weights)

    def margin(self) -> float:
        """Half the width of the 95% interval of :meth:`mean`, which is taken for normal: too little for less than about 30
        groups."""
        return NormalDist().inv_cdf(0.5 + LEVEL / 2) * self.standard_error()

    def change_since(self, before: "Measured") -> "Measured":
        """The paired difference to an earlier validation of the same rows.

        Raises:
            ValueError: they are not the same rows.
        """
        groups = before.groups if self.groups is None else self.groups
        if self.weights != before.weights or before.groups not in (None, groups):
            raise ValueError(
                "the two validations are of different rows; compare runs with the same validation settings"
            )
        pairs = zip(self.values, before.values, strict=True)
        return Measured(values=[after - earlier for after, earlier in pairs], weights=self.weights, groups=groups)


@torch.no_grad()
def validate(
    policy: Policy,
    batches: Iterable[Batch],
    generator: Generator,
    feature_extractor: FeatureExtractor,
    reward: Reward,
    seed: int,
) -> dict[str, Measured]:
    """Measure ``policy`` on ``batches``: ``cross_entropy`` and every metric that ``reward`` reports.

    Args:
        policy: what is measured.
        batches: the validation rows, on the policy's device.
        generator: draws what the reward measures; as in training, or another that costs less or reaches further.
        feature_extractor: as in training.
        reward: called row by row, so that its metrics come row by row.
        seed: of the rollouts.

    Returns:
        The rows in their order, with weight 0 where there was nothing to measure; :func:`merge` leaves those out.
    """
    rng = torch.Generator().manual_seed(seed)
    measured: dict[str, Measured] = {}

    for batch in batches:
        rollouts = generator(policy, batch, rng)
        features = feature_extractor(batch, rollouts)
        target = policy(batch, NoRollouts()(policy, batch, rng), temperature=1.0, with_target=True).target
        assert target is not None
        learned = learned_tokens(batch)
        for row in range(len(batch.tokens)):
            group = None if batch.groups is None else batch.groups[row]
            tokens = int(learned[row].sum())
            nll = -float(target[row][learned[row]].sum(dtype=torch.float64))
            found = {"cross_entropy": (nll / max(tokens, 1), tokens)}
            parts = _row(row, batch, rollouts, features)
            rewards = reward(*parts)
            for name, value in (rewards.metrics | {"duplicate_rollouts": duplicate_share(parts[1])}).items():
                found[name] = (value, int(rewards.mask.sum()))
            for name, (value, weight) in found.items():
                measured.setdefault(name, Measured()).add(value if weight else 0.0, weight, group)
    return measured


def _row(row: int, batch: Batch, rollouts: Rollouts, features: Features) -> tuple[Batch, Rollouts, Features]:
    here = slice(row, row + 1)
    return (
        batch.rows(here),
        Rollouts(
            tokens=rollouts.tokens[here],
            mask=rollouts.mask[here],
            anchors=rollouts.anchors[here],
            logprobs=rollouts.logprobs[here],
        ),
        Features(rollout=features.rollout[here], target=features.target[here], mask=features.mask[here]),
    )


def merge(parts: list[dict[str, Measured]]) -> dict[str, Measured]:
    """The measurements of all ranks as one, in the order of the rows, which the ranks took in turn. Rows of weight 0, which
    had nothing to measure, are left out."""
    merged: dict[str, Measured] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        ranks = [part[name].rows() for part in parts if name in part]
        rows = [row for turn in zip_longest(*ranks) for row in turn if row is not None and row[1]]
        if rows:
            merged[name] = Measured()
            for row in rows:
                merged[name].add(*row)
    return merged


def save_validation(run_dir: Path, step: int, measured: dict[str, Measured]) -> None:
    """Write ``validation/step_N.json``, whole or not at all."""
    path = _path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({name: vars(entry) for name, entry in measured.items()}))
    os.replace(partial, path)


def load_validations(run_dir: Path) -> dict[int, dict[str, Measured]]:
    """All validations of a run, by step, in order."""
    files = sorted((Path(run_dir) / "validation").glob("step_*.json"))
    return {
        int(file.stem.removeprefix("step_")): {
            name: Measured(**entry) for name, entry in json.loads(file.read_text()).items()
        }
        for file in files
    }


def forget_validations(run_dir: Path, after: int) -> None:
    """Remove validations of steps after ``after``, which a resumed run makes again."""
    for step in load_validations(run_dir):
        if step > after:
            _path(run_dir, step).unlink()


def _path(run_dir: Path, step: int) -> Path:
    return Path(run_dir) / "validation" / f"step_{step:06d}.json"
