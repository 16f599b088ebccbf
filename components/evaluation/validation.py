"""Validation during training: cross-entropy and the reward's measures, row by row, so that two checkpoints can be paired.

Every validation uses the same rows, the same anchors and the same uniform numbers, so the difference between two of them is
the difference between two policies. Results stand in ``validation/step_N.json`` of the output directory.
"""

import json
import math
import os
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
    """One metric over the validation rows: its mean in each row, and how much (tokens or blocks) that mean is of."""

    values: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def mean(self) -> float:
        """The mean over all tokens (or blocks)."""
        return math.fsum(v * w for v, w in zip(self.values, self.weights, strict=True)) / math.fsum(self.weights)

    def standard_error(self) -> float:
        """Standard error of :meth:`mean`, rows being independent (linearised ratio estimator); infinite for one row."""
        mean, rows = self.mean(), len(self.values)
        if rows < 2:
            return math.inf
        squares = math.fsum((w * (v - mean)) ** 2 for v, w in zip(self.values, self.weights, strict=True))
        return math.sqrt(squares * rows / (rows - 1)) / math.fsum(self.weights)

    def margin(self) -> float:
        """Half the width of the 95% interval of :meth:`mean`, which is taken for normal: too little for less than about 30
        rows."""
        return NormalDist().inv_cdf(0.5 + LEVEL / 2) * self.standard_error()

    def change_since(self, before: "Measured") -> "Measured":
        """The paired difference to an earlier validation of the same rows."""
        if len(self.values) != len(before.values) or self.weights != before.weights:
            raise ValueError(
                "the two validations are of different rows; compare runs with the same validation settings"
            )
        pairs = zip(self.values, before.values, strict=True)
        return Measured(values=[after - earlier for after, earlier in pairs], weights=self.weights)


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

    def add(name: str, value: float, weight: float) -> None:
        entry = measured.setdefault(name, Measured())
        entry.values.append(value if weight else 0.0)
        entry.weights.append(weight)

    for batch in batches:
        rollouts = generator(policy, batch, rng)
        features = feature_extractor(batch, rollouts)
        target = policy(batch, NoRollouts()(policy, batch, rng), temperature=1.0, with_target=True).target
        assert target is not None
        learned = learned_tokens(batch)
        for row in range(len(batch.tokens)):
            tokens = int(learned[row].sum())
            nll = -float(target[row][learned[row]].sum(dtype=torch.float64))
            add("cross_entropy", nll / max(tokens, 1), tokens)
            parts = _row(row, batch, rollouts, features)
            rewards = reward(*parts)
            for name, value in (rewards.metrics | {"duplicate_rollouts": duplicate_share(parts[1])}).items():
                add(name, value, int(rewards.mask.sum()))
    return measured


def _row(row: int, batch: Batch, rollouts: Rollouts, features: Features) -> tuple[Batch, Rollouts, Features]:
    here = slice(row, row + 1)
    return (
        Batch(
            tokens=batch.tokens[here],
            doc_ids=batch.doc_ids[here],
            target_mask=batch.target_mask[here],
            records=None if batch.records is None else batch.records[here],
        ),
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
        ranks = [zip(part[name].values, part[name].weights, strict=True) for part in parts if name in part]
        rows = [row for turn in zip_longest(*ranks) for row in turn if row is not None and row[1]]
        if rows:
            merged[name] = Measured([value for value, _ in rows], [weight for _, weight in rows])
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
