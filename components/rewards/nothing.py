"""What stands in for a reward where there are no rollouts to judge."""

import torch

from components.types import Batch, Features, Rewards, Rollouts


class NoReward:
    """Zero for every sample, and nothing to log."""

    uses_features = False

    def __call__(self, batch: Batch, rollouts: Rollouts, features: Features) -> Rewards:
        """Zeros ``[B, n, K]``."""
        zeros = torch.zeros_like(rollouts.logprobs[..., 0])
        return Rewards(pointwise=zeros, pairwise=zeros, mask=features.mask)
