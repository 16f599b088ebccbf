"""The reference of a KL term: a frozen policy."""

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from components.models.policy import Policy
from components.types import Batch, Rollouts


class ReferencePolicy(nn.Module):
    """A decoder that scores rollouts and never trains.

    Args:
        decoder: frozen in place; not the one that is trained, but one loaded for itself. It computes in its weights' dtype.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.policy = Policy(decoder).requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, batch: Batch, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probs of the rollout tokens, ``[B, n, K, G]`` float32; see :meth:`Policy.forward`."""
        return self.policy(batch, rollouts, temperature=temperature).rollout
