"""What stands in for rollouts where none are drawn: supervised fine-tuning goes through the same step as everything else."""

import torch

from components.types import Batch, Rollouts


class NoRollouts:
    """A generator that draws nothing and spends no random number: one masked token a row, which costs one row of logits."""

    temperature = 1.0

    def __call__(self, policy: object, batch: Batch, rng: torch.Generator) -> Rollouts:
        """``[B, 1, 1, 1]`` of which nothing counts: ``policy`` then packs nothing behind the texts."""
        tokens = batch.tokens[:, None, 1:2, None]
        return Rollouts(
            tokens=tokens,
            mask=torch.zeros_like(tokens, dtype=torch.bool),
            anchors=torch.ones_like(batch.tokens[:, :1]),
            logprobs=torch.zeros(tokens.shape, device=tokens.device),
        )
