"""What can be measured of a checkpoint: the interface of a measure, how it is run, and those that read log-probs.

A measure takes batches of its dataset and returns, for every row, statistics that only need to be summed
(``components.evaluation.statistics``). Random numbers depend on the seed and a row's place in the dataset, so all checkpoints
meet the same, on any number of processes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from rich.progress import track
from torch import Tensor

from components import training
from components.blocks import target_windows
from components.data import Rows, batch_loader
from components.evaluation.statistics import Scores
from components.losses import learned_tokens
from components.models import Policy
from components.rollouts import BlockParallelGenerator, NoRollouts
from components.types import Batch, Rollouts


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a measure found in one row.

    Attributes:
        sums: metric -> statistics. The metrics are the same in every row; ``name/3`` is the third point of a curve.
        text: what was generated, for people to read; None if nothing was.
    """

    sums: dict[str, list[float]]
    text: dict[str, Any] | None = None


class NothingToMeasure(ValueError):
    """A measure found nothing that counts in any row of its dataset."""


class Measure(ABC):
    """One way to look at a policy; a ``_component_`` under ``measures``.

    What was measured is kept, and counts as long as the package's version and ``REVISION`` are what they were: whoever changes
    what a measure finds, in its own code or in what it calls, raises its number. A hash of the code in its place would measure
    for hours again after a change of a comment or of another component, since every measure reaches most of the package.
    What a forgotten number would let through, ``tests/golden/test_measures.py`` finds: it holds what each of ours measures.

    Args:
        dataset: the rows, in the order in which they are measured.
        batch_size: rows at a time, on each process.

    Raises:
        ValueError: a stream.

    Attributes:
        reach: how many positions the policy will have to read, by default those of a row.
        combine: metrics that are no means, and how their statistics are combined (``statistics.COMBINE``).
        notes: what a reader of the numbers must know, such as a signature.
    """

    REVISION: ClassVar[int] = 1

    def __init__(self, *, dataset: Rows, batch_size: int) -> None:
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"dataset is {type(dataset).__name__}, a stream; measures need a number of rows: use "
                "components.data.PackedText with max_rows"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.reach = len(dataset[0]["tokens"])
        self.combine: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    @abstractmethod
    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> list[Row]:
        """The rows of ``batch``, measured; ``rng`` as for a generator."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a measure found in all rows: scores, and what was generated."""

    scores: Scores
    texts: list[dict[str, Any]] = field(default_factory=list)


def batches(measure: Measure, name: str) -> Collection[Batch]:
    """This rank's batches.

    Raises:
        ValueError: fewer rows than one batch on every rank takes.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        return batch_loader(
            measure.dataset, batch_size=measure.batch_size, seed=0, shuffle=False, rank=rank, world_size=world_size
        )
    except ValueError as error:
        raise ValueError(f"measures.{name}: {error}") from error


@torch.no_grad()
def run_measure(measure: Measure, policy: Policy, *, name: str, device: torch.device, seed: int) -> Found:
    """Measure ``policy`` on all rows. Collective; every rank gets the whole result.

    Raises:
        FloatingPointError: a number that is not finite.
        NothingToMeasure: no metric has anything to measure in any row.
    """
    rng = torch.Generator().manual_seed(seed)
    found: list[Row] = []
    console = training.terminal()
    shown = track(batches(measure, name), name, console=console, transient=True, disable=not console.is_interactive)
    for batch in training.phases(name, shown):
        found += [row for row, _ in zip(measure(policy, batch.to(device), rng), batch.tokens, strict=True)]
    # The ranks took rows in turn; the last turn is filled up with rows that are no rows of the dataset.
    turns = zip(*training.gather(found), strict=True)
    rows = [row for turn in turns for row in turn][: len(measure.dataset)]
    sums = {metric: [row.sums[metric] for row in rows] for metric in rows[0].sums}
    for metric, statistics in sums.items():
        if not all(math.isfinite(number) for row in statistics for number in row):
            raise FloatingPointError(f"measures.{name}: {metric} is not finite; the checkpoint's weights have diverged")
    if not any(number for statistics in sums.values() for row in statistics for number in row[1:]):
        raise NothingToMeasure(
            f"measures.{name}: no row of its dataset has anything to measure ({', '.join(sums)}); give it other rows"
        )
    return Found(
        scores=Scores(groups=row_groups(measure.dataset), sums=sums, combine=measure.combine),
        texts=[row.text for row in rows if row.text is not None],
    )


def row_groups(dataset: Rows) -> list[str]:
    """What each row belongs to, itself if rows name no group (see ``Rows``)."""
    return [dataset[index].get("group", f"row {index}") for index in range(len(dataset))]


class CrossEntropy(Measure):
    """Next-token cross-entropy on the ground truth, nats per token.

    Args:
        dataset: the rows.
        batch_size: rows at a time.
        region: ``"all"`` tokens that have a predecessor in their document, or those of the ``"target"``, which is learned
            from.
    """

    def __init__(self, *, dataset: Rows, batch_size: int, region: Literal["all", "target"] = "target") -> None:
        super().__init__(dataset=dataset, batch_size=batch_size)
        self.region = region

    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> list[Row]:
        """``cross_entropy`` of every row, weighted by its tokens."""
        nll = -_target_logprobs(policy, batch, rng)
        counted = learned_tokens(batch) if self.region == "target" else _follows(batch)
        return means(cross_entropy=(nll, counted))


class TokenEntropy(Measure):
    """How sure the policy is of the ``k``-th token it writes, against how well it predicts the ``k``-th token of the data.

    For ``k = 1 ... G`` behind every anchor: ``entropy/k`` of the policy's distribution (at temperature 1, in nats) behind its
    own tokens before, ``entropy_sampling/k`` at the temperature it samples with, and ``cross_entropy/k`` of the ground truth
    at the same place. At temperature 1 a calibrated model's entropy stays at its cross-entropy; one that loses its way in
    what it wrote itself rises above, one that repeats itself falls below. Behind a stop token nothing is written: late points
    are of fewer rollouts, or of none, and then have no value.

    Args:
        dataset: the rows.
        batch_size: rows at a time.
        generator: anchors, length and temperature of the rollouts.

    Raises:
        ValueError: greedy rollouts.
    """

    def __init__(self, *, dataset: Rows, batch_size: int, generator: BlockParallelGenerator) -> None:
        if generator.temperature <= 0:
            raise ValueError("generator.temperature is 0: a greedy policy has no entropy; set it above 0")
        super().__init__(dataset=dataset, batch_size=batch_size)
        self.generator = generator

    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> list[Row]:
        """The three curves of every row, weighted by rollout tokens and by ground-truth tokens."""
        rollouts = self.generator(policy, batch, rng)
        plain, sampling = policy.entropies(batch, rollouts, (1.0, self.generator.temperature))
        nll, known = _behind_anchors(-_target_logprobs(policy, batch, rng), batch, rollouts)
        curves: dict[str, tuple[Tensor, Tensor]] = {}
        for name, values, counted in (
            ("entropy", plain, rollouts.mask),
            ("entropy_sampling", sampling, rollouts.mask),
            ("cross_entropy", nll, known),
        ):
            for k in range(values.shape[-1]):
                curves[f"{name}/{k + 1}"] = values[..., k], counted[..., k]
        return means(**curves)


def means(**metrics: tuple[Tensor, Tensor]) -> list[Row]:
    """Rows of means, from values ``[B, ...]`` and which of them count, bool of the same shape."""
    sums = {
        name: torch.stack(
            (
                values.double().where(counted, 0.0).flatten(1).sum(dim=1),
                counted.flatten(1).sum(dim=1).double(),
            ),
            dim=1,
        ).tolist()
        for name, (values, counted) in metrics.items()
    }
    B = len(next(iter(sums.values())))
    return [Row(sums={name: statistics[row] for name, statistics in sums.items()}) for row in range(B)]


def _target_logprobs(policy: Policy, batch: Batch, rng: torch.Generator) -> Tensor:
    """``[B, L-1]`` float32, see ``Logprobs.target``."""
    target = policy(batch, NoRollouts()(policy, batch, rng), temperature=1.0, with_target=True).target
    assert target is not None
    return target


def _follows(batch: Batch) -> Tensor:
    """``[B, L-1]`` bool: tokens, from the second on, that have a predecessor in their document."""
    return (batch.doc_ids[:, 1:] >= 0) & (batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1])


def _behind_anchors(values: Tensor, batch: Batch, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """``values`` ``[B, L-1]`` of the ground truth where the rollouts' tokens stand, ``[B, K, G]``, and which of them are there:
    in the row, in the document that the block continues, and of a block that counts."""
    index, in_row = target_windows(rollouts.anchors, rollouts.tokens.shape[-1], batch.tokens.shape[1])
    documents = batch.doc_ids.gather(1, index.flatten(1)).view(index.shape)
    continued = batch.doc_ids.gather(1, rollouts.anchors - 1)[..., None]
    known = in_row & (documents == continued) & (documents >= 0) & rollouts.mask.any(dim=-1).any(dim=1)[..., None]
    return values.gather(1, (index - 1).flatten(1)).view(index.shape), known
