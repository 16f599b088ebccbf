"""The feature-matching reward of energy-based fine-tuning (paper eq. 7-9) and what is measured along with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from components.rewards.whitening import WHITENINGS, Whitened, Whitening, whiten
from components.types import Batch, Features, Rewards, Rollouts


class FeatureMatchingReward:
    """Alignment with the ground truth minus similarity to the other samples (paper eq. 7)::

        r_j = alignment_coef * 2 cos(phi_j, phi_y)  -  diversity_coef * 2/(n-1) sum_{j' != j} phi_j . phi_j'

    over whitened features (eq. 8-9). Alignment is a cosine in every mode, diversity a raw dot product. The first term is
    ``Rewards.pointwise``, the second ``Rewards.pairwise`` (0 for ``n = 1``).

    Args:
        alignment_coef: weight of the first term.
        diversity_coef: weight of the second; 1 makes the expected reward a proper scoring rule, 0.5 is the paper's bias.
        whitening: see :func:`components.rewards.whitening.whiten`.
        tolerance: singular values of a block's features below this share of the largest count as zero.

    Raises:
        ValueError: a negative coefficient, an unknown ``whitening``, or ``tolerance`` outside [0, 1).
        FloatingPointError: non-finite features (when called).
    """

    uses_features = True

    def __init__(
        self,
        *,
        alignment_coef: float = 1.0,
        diversity_coef: float = 1.0,
        whitening: Whitening = "feature_space",
        tolerance: float = 1e-5,
    ) -> None:
        if whitening not in WHITENINGS:
            raise ValueError(f"whitening is {whitening!r}; choose one of {', '.join(WHITENINGS)}")
        if alignment_coef < 0 or diversity_coef < 0:
            raise ValueError(
                f"alignment_coef is {alignment_coef}, diversity_coef {diversity_coef}; a negative one would reward the opposite"
            )
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it is a share of the largest singular value, in [0, 1)")
        self.alignment_coef = alignment_coef
        self.diversity_coef = diversity_coef
        self.whitening = whitening
        self.tolerance = tolerance

    @torch.no_grad()
    def __call__(self, batch: Batch, rollouts: Rollouts, features: Features) -> Rewards:
        """Rewards ``[B, n, K]`` of every rollout; zero where ``features.mask`` is False."""
        # float64: differences of unwhitened dot products are small against their size.
        rollout = features.rollout.double().movedim(1, 2)  # [B, K, n, D] or [B, K, n, layers, D]
        target = features.target.double()
        _require_finite(rollout, target)
        if rollout.ndim == 5:  # stacked layers are whitened one by one and meet in the dot products
            rollout = rollout.movedim(3, 2)  # [B, K, layers, n, D]
        whitened = whiten(rollout, target, self.whitening, self.tolerance)
        raw = Whitened(rollout, target[..., None, :], whitened.negative)
        if rollout.ndim == 5:
            whitened, raw = _join_layers(whitened), _join_layers(raw)
        alignment = 2 * F.cosine_similarity(whitened.rollout, whitened.target, dim=-1)  # [B, K, n]
        diversity = 2 * _mean_dot_with_others(whitened.rollout)
        counts = features.mask[..., None]
        return Rewards(
            pointwise=(self.alignment_coef * alignment * counts).transpose(1, 2).float(),
            pairwise=(-self.diversity_coef * diversity * counts).transpose(1, 2).float(),
            mask=features.mask,
            metrics=block_means(
                features.mask,
                alignment=alignment,
                diversity=diversity,
                reward=self.alignment_coef * alignment - self.diversity_coef * diversity,
                feature_matching_loss=feature_matching_loss(raw),
                feature_matching_loss_whitened=feature_matching_loss(whitened),
                negative_target_factors=whitened.negative,
            ),
        )


def feature_matching_loss(features: Whitened) -> Tensor:
    """``|mean_j phi_j - phi_y|^2`` of every block, ``[..., n, D]`` to ``[..., 1]`` (paper eq. 2 on unwhitened features)."""
    gap = (features.rollout - features.target).mean(dim=-2)
    return gap.square().sum(dim=-1, keepdim=True)


def block_means(mask: Tensor, **values: Tensor) -> dict[str, float]:
    """Means of ``[B, K, ...]`` values over the blocks that count (0 if none does); ``mask`` is ``[B, K]``."""
    blocks = mask.sum().clamp(min=1)
    return {
        name: float((value.float().flatten(2).mean(dim=-1) * mask).sum() / blocks) for name, value in values.items()
    }


def _mean_dot_with_others(rollout: Tensor) -> Tensor:
    """``[..., n, D]`` to ``[..., n]``: mean dot product with the other samples, 0 if there are none."""
    dots = rollout @ rollout.transpose(-1, -2)
    others = dots.sum(dim=-1) - dots.diagonal(dim1=-2, dim2=-1)
    return others / max(1, rollout.shape[-2] - 1)


def _join_layers(features: Whitened) -> Whitened:
    """``[B, K, layers, n, D]`` to ``[B, K, n, layers * D]``."""
    rollout, target = (x.movedim(2, 3).flatten(3) for x in (features.rollout, features.target))
    return Whitened(rollout, target, features.negative.movedim(2, 3))


def _require_finite(rollout: Tensor, target: Tensor) -> None:
    finite = rollout.flatten(2).isfinite().all(dim=-1) & target.flatten(2).isfinite().all(dim=-1)
    if not bool(finite.all()):
        sequence, block = (~finite).nonzero()[0].tolist()
        raise FloatingPointError(
            f"non-finite features at sequence {sequence}, block {block}; check the feature network's dtype and checkpoint"
        )
