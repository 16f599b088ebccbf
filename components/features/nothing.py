"""What stands in for features where no reward reads them, as in RLVR and supervised fine-tuning."""

from components.types import Batch, Features, Rollouts


class NoFeatures:
    """A feature extractor without a network: vectors of no numbers, and the mask that every extractor gives."""

    def __call__(self, batch: Batch, rollouts: Rollouts) -> Features:
        """``[B, n, K, 0]`` and ``[B, K, 0]`` float32; a block counts where its rollouts do."""
        B, n, K, _ = rollouts.tokens.shape
        return Features(
            rollout=rollouts.logprobs.new_zeros(B, n, K, 0),
            target=rollouts.logprobs.new_zeros(B, K, 0),
            mask=rollouts.mask.any(dim=-1).any(dim=1),
        )
