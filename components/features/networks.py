"""Feature networks: who reads rollouts and ground truth, and gives back hidden states.

A network reads the packed sequence in one forward, as the policy does, and stops after its deepest tap: no final norm, no
head. It never trains.
"""

import copy
import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from components.blocks import PackedAttention, PackedLayout, install
from components.models import hidden_states, materialize, use_lean_layers
from components.types import Batch, Rollouts


class FeatureNetwork(Protocol):
    """Hidden states of a packed batch."""

    num_layers: int

    def keep_layers(self, depth: int) -> None:
        """Only the first ``depth`` layers will be asked for: free the others."""

    def __call__(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        """The layout of the packed sequence, and ``[B, S, width]`` after each of the layers ``taps`` (1 is the first)."""


class FrozenNetwork(nn.Module):
    """A frozen copy of a decoder (paper: of the policy before training; after a warm start, of the base model).

    Args:
        decoder: copied, so that it may be the very one the policy trains. If its weights are deferred, only those that
            :meth:`keep_layers` leaves are ever read.
        keep_head: keep what features do not need (later layers, norm and head), so that it can also be the reference of a
            KL term (``components.features.NetworkReference``).
    """

    def __init__(self, decoder: TransformerDecoder, *, keep_head: bool = False) -> None:
        super().__init__()
        self.decoder = copy.deepcopy(decoder)
        self.keep_head = keep_head
        if not keep_head:
            self.decoder.norm = self.decoder.output = nn.Identity()
        self.decoder.requires_grad_(False).eval()
        install(self.decoder)
        use_lean_layers(self.decoder)
        self.num_layers = len(self.decoder.layers)
        self._identity: str | None = None

    def identity(self) -> str:
        """A name for the weights that are read: equal if and only if they are, bit for bit. Hashed once."""
        if self._identity is None:
            digest = hashlib.sha256()
            for name, value in self.decoder.state_dict().items():
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._identity = f"FrozenNetwork {digest.hexdigest()[:16]}"
        return self._identity

    def keep_layers(self, depth: int) -> None:
        """Cut the network after layer ``depth``, unless it keeps its head; ``num_layers`` still tells how deep it was."""
        if not self.keep_head:
            self.decoder.layers = self.decoder.layers[:depth]

    @torch.no_grad()
    def forward(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        """See :class:`FeatureNetwork`; hidden states come in the weights' dtype."""
        if self.decoder.tok_embeddings.weight.is_meta:  # nobody reached it inside a component of the user's own
            materialize(self.decoder, batch.tokens.device)
        _, n, _, G = rollouts.tokens.shape
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=rollouts.anchors, num_samples=n, block_len=G)
        tokens = layout.pack(batch.tokens, rollouts.tokens)
        return layout, hidden_states(self.decoder, tokens, layout.positions(), PackedAttention(layout), taps)
