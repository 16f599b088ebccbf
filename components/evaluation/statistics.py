"""From rows to numbers with intervals: every metric is a function of sums over rows, so one bootstrap serves all of them.

A mean is a sum of weighted values over a sum of weights, corpus BLEU a function of summed n-gram counts. Rows that share a
group (a module, a page) are not independent and are drawn together. All checkpoints are measured on the same rows and
resampled alike, so a difference between two of them is one of pairs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU, CHRF

Array = NDArray[np.float64]

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What one measure found on one checkpoint.

    Attributes:
        groups: of each row; rows of one group are resampled together.
        sums: metric -> the statistics of every row, ``[rows][S]``; zeros where a row has nothing to measure.
        combine: how the summed statistics of a metric make its value, a name of ``COMBINE``; ``"mean"`` where not named.
    """

    groups: list[str] = field(default_factory=list)
    sums: dict[str, list[list[float]]] = field(default_factory=dict)
    combine: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a metric of one checkpoint is from another's, by pairs; None as in :class:`Estimate`."""

    value: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric of a checkpoint.

    Attributes:
        value: None where there was nothing to measure, such as a point of a curve that no rollout reached.
        interval: None where fewer than two groups had anything to measure.
        groups: how many had: few of a measure's, where few rollouts reach a point.
        differences: to each of the other checkpoints that were asked for, by name.
    """

    value: float | None
    interval: tuple[float, float] | None
    groups: int
    differences: dict[str, Difference]


def _mean(sums: Array) -> Array:
    """``(sum of weighted values, sum of weights)`` ``[..., 2]``; not a number where nothing has weight."""
    with np.errstate(invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def _sacrebleu(metric: BLEU | CHRF) -> Callable[[Array], Array]:
    def score(sums: Array) -> Array:
        # Not public, but what sacrebleu's own significance tests are made of; the statistics are whole numbers.
        return np.apply_along_axis(lambda s: metric._compute_score_from_stats(s.astype(int).tolist()).score, -1, sums)

    return score


COMBINE: dict[str, Callable[[Array], Array]] = {"mean": _mean, "bleu": _sacrebleu(BLEU()), "chrf": _sacrebleu(CHRF())}


def compare(
    scores: Mapping[str, Scores], *, compare_with: Sequence[str], resamples: int, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Every metric of every checkpoint, with bootstrap intervals of 95% (percentiles) and the paired differences to some.

    Args:
        scores: checkpoint -> what the same measure found on the same rows.
        compare_with: the checkpoints to which every other one's differences are wanted.
        resamples: how often groups are drawn, with replacement, as many as there are.
        seed: of the draws, which are the same for all checkpoints and metrics.

    Returns:
        Metric -> checkpoint -> estimate.
    """
    first = next(iter(scores.values()))
    assert all(each.groups == first.groups and each.combine == first.combine for each in scores.values())
    widths = [len(rows[0]) for rows in first.sums.values()]
    ends = np.cumsum(widths)
    sums = {checkpoint: _sum_by_group(each) for checkpoint, each in scores.items()}
    drawn = {checkpoint: _resample(each, resamples, seed) for checkpoint, each in sums.items()}

    estimates: dict[str, dict[str, Estimate]] = {}
    for metric, width, end in zip(first.sums, widths, ends, strict=True):
        combine, columns = COMBINE[first.combine.get(metric, "mean")], slice(end - width, end)
        values = {checkpoint: float(combine(each[:, columns].sum(axis=0))) for checkpoint, each in sums.items()}
        draws = {checkpoint: combine(each[:, columns]) for checkpoint, each in drawn.items()}
        # Of how many groups an interval speaks: one alone would be drawn again and again, and look certain.
        groups = {checkpoint: int(_measured(each[:, columns]).sum()) for checkpoint, each in sums.items()}
        estimates[metric] = {
            checkpoint: Estimate(
                value=_known(values[checkpoint]),
                interval=_interval(draws[checkpoint], groups[checkpoint]),
                groups=groups[checkpoint],
                differences={
                    other: Difference(
                        value=_known(values[checkpoint] - values[other]),
                        interval=_interval(draws[checkpoint] - draws[other], min(groups[checkpoint], groups[other])),
                    )
                    for other in compare_with
                    if other != checkpoint
                },
            )
            for checkpoint in scores
        }
    return estimates


def _measured(statistics: Array) -> NDArray[np.bool_]:
    """``[..., S] -> [...]``: where there was anything to measure, for which all but the first statistic stand."""
    return (statistics[..., 1:] != 0).any(axis=-1)


def _sum_by_group(scores: Scores) -> Array:
    """``[groups, C]``: the statistics of all metrics, side by side."""
    _, group_of_row = np.unique(scores.groups, return_inverse=True)
    rows = np.concatenate([np.asarray(each, dtype=np.float64) for each in scores.sums.values()], axis=1)
    sums = np.zeros((group_of_row.max() + 1, rows.shape[1]))
    np.add.at(sums, group_of_row, rows)
    return sums


def _resample(sums: Array, resamples: int, seed: int) -> Array:
    """``[resamples, C]``: sums over groups, of ``[groups, C]``, that are drawn with replacement."""
    rng = np.random.default_rng(seed)
    groups = len(sums)
    counts = (np.bincount(rng.integers(groups, size=groups), minlength=groups) for _ in range(resamples))
    return np.stack([count @ sums for count in counts])


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _interval(draws: Array, groups: int) -> tuple[float, float] | None:
    if groups < 2:
        return None
    # A resample without anything to measure says nothing.
    low, high = np.nanquantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples is right, from ``n`` of which ``correct`` are (Chen et al.
    2021, eq. 1): ``1 - C(n - correct, k) / C(n, k)``."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
