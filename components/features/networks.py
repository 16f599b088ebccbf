"""Feature networks: who reads rollouts and ground truth, and gives back hidden states.

A network reads the packed sequence in one forward, as the policy does, and stops after its deepest tap: no final norm, no
head. It receives no gradient. :class:`FrozenNetwork` holds weights of its own; :class:`AdapterFree` reads those of a policy
with adapters; ``components.features.average`` follows the policy.
"""

import copy
from typing import Protocol

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchtune.modules import TransformerDecoder

from components.blocks import PackedLayout, install
from components.features.quantization import quantize
from components.models import (
    Policy,
    adapters_disabled,
    has_adapters,
    materialize,
    read_packed,
    use_lean_layers,
    weights_identity,
)
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

    Every rank holds all of it, unless ``shard``.

    Args:
        decoder: copied, so that it may be the very one the policy trains. If its weights are deferred, only those that
            :meth:`keep_layers` leaves are ever read.
        keep_head: keep what features do not need (later layers, norm and head), so that it can also be the reference of a
            KL term (``components.features.NetworkReference``).
        quantization: a torchao config for weights, such as ``torchao.quantization.Int8WeightOnlyConfig`` or
            :class:`NF4WeightOnlyConfig`, for the matrices of attention and MLPs.
        shard: spread the weights over all ranks (``fully_shard`` per layer, see ``components.training.place``) and gather
            them layer by layer in every forward.

    Raises:
        ValueError: ``shard`` with ``quantization``, since torchao's tensors do not survive it, or with ``keep_head``.
    """

    def __init__(
        self,
        decoder: TransformerDecoder,
        *,
        keep_head: bool = False,
        quantization: AOBaseConfig | None = None,
        shard: bool = False,
    ) -> None:
        super().__init__()
        if shard and (quantization is not None or keep_head):
            raise ValueError(
                f"shard is true with {'keep_head' if quantization is None else 'quantization'}: a sharded feature network is "
                "neither quantised nor a reference; remove one of them"
            )
        self.decoder = copy.deepcopy(decoder)
        self.keep_head = keep_head
        self.shard = shard
        if not keep_head:
            self.decoder.norm = self.decoder.output = nn.Identity()
        self.decoder.requires_grad_(False).eval()
        install(self.decoder)
        use_lean_layers(self.decoder)
        if quantization is not None:
            quantize(self.decoder, quantization)
        self.num_layers = len(self.decoder.layers)
        self._identity: str | None = None

    def identity(self) -> str:
        """A name for the weights that are read: equal if and only if they are, bit for bit. Hashed once; collective."""
        if self._identity is None:
            self._identity = f"{type(self).__name__} {weights_identity(self.decoder.state_dict().items())}"
        return self._identity

    def keep_layers(self, depth: int) -> None:
        """Cut the network after layer ``depth``, unless it keeps its head; ``num_layers`` still tells how deep it was."""
        if not self.keep_head:
            self.decoder.layers = self.decoder.layers[:depth]

    @torch.no_grad()
    def forward(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        """See :class:`FeatureNetwork`; hidden states come in the weights' dtype."""
        if self.decoder.tok_embeddings.weight.is_meta:  # nobody reached it inside a component of the user's own
            if self.shard:
                raise ValueError("shard is true, but the network is no attribute of the feature extractor; make it one")
            materialize(self.decoder, batch.tokens.device)
        return read_packed(self.decoder, batch, rollouts, taps)


class AdapterFree:
    """The policy without its adapters: the model before training, with no weights of its own.

    Equal to a :class:`FrozenNetwork` of the policy's base, in what the policy computes in.

    Args:
        policy: the run's; the recipe gives it.

    Raises:
        ValueError: it has no adapters, so that it would be what trains.
    """

    def __init__(self, *, policy: Policy) -> None:
        if not has_adapters(policy):
            raise ValueError(
                "AdapterFree needs a policy with adapters, and this one trains its own weights; set model to "
                "components.models.load_lora_decoder, or use components.features.FrozenNetwork"
            )
        self.policy = policy
        self.num_layers = len(policy.decoder.layers)

    def identity(self) -> str:
        """A name for the base's weights, see :meth:`FrozenNetwork.identity`. Collective."""
        weights = self.policy.decoder.state_dict().items()
        return f"AdapterFree {weights_identity(entry for entry in weights if '.lora_' not in entry[0])}"

    def keep_layers(self, depth: int) -> None:
        """Nothing to free: the policy needs them all."""

    def __call__(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        """See :class:`FeatureNetwork`."""
        with adapters_disabled(self.policy):
            return self.policy.read(batch, rollouts, taps)
