"""A feature network of one's own: it has learned nothing, to see what a trained one adds."""

import torch
from torch import Tensor, nn

from components.blocks import PackedLayout
from components.models import Policy
from components.types import Batch, Rollouts


class RandomNetwork(nn.Module):
    """One layer, which turns each token into a random vector of its own: with ``pooling: mean`` features count words.

    Args:
        policy: the recipe gives it; only the size of its vocabulary is read.
        width: of a vector.
    """

    num_layers = 1

    def __init__(self, *, policy: Policy, width: int = 256) -> None:
        super().__init__()
        vocabulary = policy.decoder.tok_embeddings.num_embeddings
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("vectors", torch.randn(vocabulary, width, generator=rng))

    def keep_layers(self, depth: int) -> None:
        """There are no further layers to free."""

    def forward(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        _, n, _, G = rollouts.tokens.shape
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=rollouts.anchors, num_samples=n, block_len=G)
        tokens = layout.pack(batch.tokens, rollouts.tokens)  # only the layout knows the order
        return layout, [self.vectors[tokens] for _ in taps]
