"""A reward of one's own: matching tokens instead of features, to see what features add."""

import torch

from components.blocks import target_windows
from components.types import Batch, Features, Rewards, Rollouts


class TokenMatch:
    """The share of a rollout's tokens that are the true ones of their places."""

    uses_features = False  # so none are made

    def __init__(self, *, coef: float = 1.0) -> None:
        self.coef = coef

    def __call__(self, batch: Batch, rollouts: Rollouts, features: Features) -> Rewards:
        B, n, K, G = rollouts.tokens.shape
        index, in_row = target_windows(rollouts.anchors, G, batch.tokens.shape[1])  # [B, K, G]
        truth = batch.tokens.gather(1, index.flatten(1)).view(B, K, G)
        right = (rollouts.tokens == truth[:, None]) & in_row[:, None] & rollouts.mask
        share = right.sum(dim=-1) / rollouts.mask.sum(dim=-1).clamp(min=1)  # [B, n, K]
        counts = rollouts.mask.any(dim=-1).any(dim=1)  # [B, K], the blocks that count
        return Rewards(
            pointwise=self.coef * share,
            pairwise=torch.zeros_like(share),  # no term that depends on the other samples
            mask=counts,
            metrics={"token_match": share.transpose(1, 2)[counts].mean().item()},
        )
