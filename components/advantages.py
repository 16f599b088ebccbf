"""Baselines: from rewards to advantages. All return ``[B, n, K]`` float32, zero where ``rewards.mask`` is False."""

from torch import Tensor

from components.types import Rewards


class RLOO:
    """Leave-one-out baseline for rewards with a pairwise term (paper eq. 94).

    A sample's pointwise reward is compared with the mean of the others'. Its pairwise reward already averages over the
    others, so its baseline is what they would have scored among themselves without it: ``(sum_k d_k - 2 d_j) / (n - 2)``.
    For ``n = 2`` nobody is left to pair with and that baseline is 0.

    Raises:
        ValueError: fewer than two samples per anchor.
    """

    def __call__(self, rewards: Rewards) -> Tensor:
        """Advantages, ``[B, n, K]``."""
        n = rewards.pointwise.shape[1]
        if n < 2:
            raise ValueError(
                f"RLOO needs at least 2 samples per anchor, generator.num_samples is {n}; raise it, or use Reinforce"
            )
        point, pair = rewards.pointwise.double(), rewards.pairwise.double()
        baseline = (point.sum(dim=1, keepdim=True) - point) / (n - 1)
        if n > 2:
            baseline = baseline + (pair.sum(dim=1, keepdim=True) - 2 * pair) / (n - 2)
        return ((point + pair - baseline) * rewards.mask[:, None]).float()


class GroupNorm:
    """Rewards standardised over the samples of their anchor, as in GRPO (mean and unbiased standard deviation over ``n``).

    Args:
        eps: added to the standard deviation.

    Raises:
        ValueError: fewer than two samples per anchor.
    """

    def __init__(self, *, eps: float = 1e-4) -> None:
        self.eps = eps

    def __call__(self, rewards: Rewards) -> Tensor:
        """Advantages, ``[B, n, K]``."""
        total = rewards.total
        if total.shape[1] < 2:
            raise ValueError(
                f"GroupNorm needs at least 2 samples per anchor, generator.num_samples is {total.shape[1]}; "
                "raise it, or use Reinforce"
            )
        centred = total - total.mean(dim=1, keepdim=True)
        return centred / (total.std(dim=1, keepdim=True) + self.eps) * rewards.mask[:, None]


class Reinforce:
    """No baseline: the advantage is the reward."""

    def __call__(self, rewards: Rewards) -> Tensor:
        """Advantages, ``[B, n, K]``."""
        return rewards.total * rewards.mask[:, None]
