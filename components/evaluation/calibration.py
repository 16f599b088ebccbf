"""Calibration: are the policy's continuations, of whatever length, distributed like the true ones (paper eq. 2)?

The feature-matching loss as a function of the rollout length. One rollout of the longest length serves all others, whose
tokens are its first ones, and one forward of the feature network reads them all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from components.data import Rows
from components.evaluation.measures import Measure, Row, means
from components.features import HiddenStateFeatures
from components.models import Policy
from components.rewards import Whitened, Whitening, whiten
from components.rewards.energy import feature_matching_loss
from components.rollouts import BlockParallelGenerator
from components.types import Batch, Features


class Calibration(Measure):
    """The feature-matching loss at several rollout lengths ``T``, each over the blocks that the longest rollouts have.

    - ``feature_matching_loss/T``: ``|mean_j phi_j - phi_y|^2`` of features as they are (paper eq. 2).
    - ``feature_matching_loss_unbiased/T``: the same for infinitely many samples, estimated. The mean of ``n`` samples is off by
      its own variance, which makes the loss above larger by ``E|phi - E phi|^2 / n``: a policy that writes less diversely looks
      better than it is. Dot products of distinct samples have no such term (a U-statistic), so that this one may be negative.
    - ``feature_matching_loss_whitened/T``: the first, whitened by the ``n`` samples (eq. 8), as the reward is. Whitening by the
      samples themselves has no unbiased form.

    Args:
        dataset: the rows.
        batch_size: rows at a time.
        generator: draws rollouts of the longest length, two or more at each anchor.
        feature_extractor: of frozen weights, the same for all checkpoints.
        lengths: ``T``; the largest is the generator's ``rollout_len``.
        whitening: of the third loss.

    Raises:
        ValueError: a single sample, or lengths that are not the generator's.
    """

    def __init__(
        self,
        *,
        dataset: Rows,
        batch_size: int,
        generator: BlockParallelGenerator,
        feature_extractor: HiddenStateFeatures,
        lengths: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        whitening: Whitening = "feature_space",
    ) -> None:
        if generator.num_samples < 2:
            raise ValueError("generator.num_samples is 1, and the unbiased loss is one of pairs; draw at least 2")
        if not lengths or min(lengths) < 1 or max(lengths) != generator.rollout_len:
            raise ValueError(
                f"lengths are {list(lengths)} and generator.rollout_len is {generator.rollout_len}; give lengths from 1 on of "
                "which that is the largest"
            )
        super().__init__(dataset=dataset, batch_size=batch_size)
        self.generator = generator
        self.feature_extractor = feature_extractor
        self.lengths = sorted(set(lengths))
        self.whitening: Whitening = whitening

    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> list[Row]:
        """The three losses of every row at each length, weighted by the row's blocks."""
        rollouts = self.generator(policy, batch, rng)
        curves = {}
        prefixes = self.feature_extractor.prefixes(batch, rollouts, self.lengths)
        for length, features in zip(self.lengths, prefixes, strict=True):
            for name, loss in block_losses(features, self.whitening).items():
                curves[f"{name}/{length}"] = loss, features.mask
        return means(**curves)


def block_losses(features: Features, whitening: Whitening) -> dict[str, Tensor]:
    """The three losses of :class:`Calibration` for every block, ``[B, K]`` float64."""
    # As in the reward: differences of dot products are small against their size.
    rollout = features.rollout.double().movedim(1, -2)  # [B, K, n, D], or [B, K, layers, n, D] if layers are stacked
    target = features.target.double()
    n = rollout.shape[-2]
    negative = torch.zeros(rollout.shape[:-1], dtype=torch.bool, device=rollout.device)
    plain = feature_matching_loss(Whitened(rollout, target[..., None, :], negative))[..., 0]
    spread = (rollout - rollout.mean(dim=-2, keepdim=True)).square().sum(dim=(-1, -2)) / (n - 1)
    losses = {
        "feature_matching_loss": plain,
        "feature_matching_loss_unbiased": plain - spread / n,
        "feature_matching_loss_whitened": feature_matching_loss(whiten(rollout, target, whitening, 1e-5))[..., 0],
    }
    # Layers that are stacked are so many parts of one vector.
    return {name: loss.flatten(2).sum(dim=2) if loss.ndim == 3 else loss for name, loss in losses.items()}
