"""From hidden states to one feature vector per rollout and per ground-truth window (paper, section 3 and appendix on features).

Order of operations, as in the authors' code: take the hidden states after some layers, combine them, normalise per token,
pool over the window. Everything after the network is float32.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.blocks import target_windows
from components.features.networks import FeatureNetwork
from components.types import Batch, Features, Rollouts


class HiddenStateFeatures:
    """Hidden states of a feature network, combined over layers, normalised per token and pooled over the window.

    Args:
        network: reads the rollouts.
        layers: which to tap; a fraction of the depth (``0.25`` of 30 layers is layer 7), or a layer counted from 1.
        combine: ``"concat"`` layers into one vector, take their ``"mean"``, or ``"stack"`` them, which keeps them apart
            until after whitening.
        pooling: the ``"last_token"`` of the window (paper: code), the ``"mean"`` over its tokens (paper: translation), or
            all of them, by ``"concat"``. Only tokens before a stop count.
        norm: L2-normalise each token's vector ``"joint"`` over the combined layers, or ``"per_layer"`` before combining
            (concatenated vectors are then scaled to keep unit length).

    Raises:
        ValueError: no layers, a layer the network does not have, or an unknown option.
    """

    def __init__(
        self,
        *,
        network: FeatureNetwork,
        layers: Sequence[float] = (0.25, 0.5, 0.75),
        combine: Literal["concat", "mean", "stack"] = "concat",
        pooling: Literal["last_token", "mean", "concat"] = "last_token",
        norm: Literal["joint", "per_layer"] = "joint",
    ) -> None:
        for name, value, choices in (
            ("combine", combine, ("concat", "mean", "stack")),
            ("pooling", pooling, ("last_token", "mean", "concat")),
            ("norm", norm, ("joint", "per_layer")),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        self.network = network
        self.taps = _resolve_layers(layers, network.num_layers)
        self.combine = combine
        self.pooling = pooling
        self.norm = norm
        network.keep_layers(self.taps[-1])

    def __call__(self, batch: Batch, rollouts: Rollouts) -> Features:
        """Features of ``rollouts`` and of the windows of ``batch`` behind the same prefixes; a block counts where its
        rollouts do.

        Raises:
            FloatingPointError: non-finite features (naming the first block).
        """
        return next(self.prefixes(batch, rollouts, [rollouts.tokens.shape[-1]]))

    @torch.no_grad()
    def prefixes(self, batch: Batch, rollouts: Rollouts, lengths: Sequence[int]) -> Iterator[Features]:
        """What a call gives for the first ``T`` tokens of ``rollouts``, for each ``T`` of ``lengths``: from one forward, since
        a token does not see those behind it."""
        layout, states = self.network(batch, rollouts, self.taps)
        index, in_prompt = target_windows(rollouts.anchors, rollouts.tokens.shape[-1], layout.prompt_len)
        own_document = batch.doc_ids.gather(1, index.flatten(1)).view(index.shape) >= 0
        target_mask = in_prompt & own_document
        blocks, windows = [layout.unpack(h) for h in states], [_take(h, index) for h in states]
        for T in lengths:
            features = Features(
                rollout=self._embed([h[..., :T, :] for h in blocks], rollouts.mask[..., :T]),
                target=self._embed([h[..., :T, :] for h in windows], target_mask[..., :T]),
                mask=rollouts.mask[..., :T].any(dim=-1).any(dim=1),
            )
            _require_finite(features)
            yield features

    def _embed(self, states: list[Tensor], mask: Tensor) -> Tensor:
        """``[..., G, width]`` per layer and ``[..., G]`` bool to ``[..., D]`` (``[..., layers, D]`` if stacked)."""
        if self.pooling == "last_token":
            # Pooling picks a token, so it can go first: everything else then works on one token instead of G.
            last = (mask.sum(dim=-1) - 1).clamp(min=0)[..., None, None]
            states = [h.gather(-2, last.expand(*h.shape[:-2], 1, h.shape[-1])) for h in states]
            mask = torch.ones_like(last[..., 0], dtype=torch.bool)
        tokens = self._combine([h.float() for h in states])  # [..., G, layers, width], layers 1 unless stacked
        weight = mask[..., None, None].to(tokens.dtype)
        if self.pooling == "concat":
            pooled = (tokens * weight).transpose(-3, -2).flatten(-2)
        else:
            pooled = (tokens * weight).sum(dim=-3) / weight.sum(dim=-3).clamp(min=1)
        return pooled if self.combine == "stack" else pooled.squeeze(-2)

    def _combine(self, states: list[Tensor]) -> Tensor:
        stacked = torch.stack(states, dim=-2)
        if self.norm == "per_layer" or self.combine == "stack":
            stacked = F.normalize(stacked, dim=-1)
        if self.combine == "stack":
            return stacked
        if self.combine == "mean":
            combined = stacked.mean(dim=-2)
        else:
            combined = stacked.flatten(-2)
        if self.norm == "joint":
            combined = F.normalize(combined, dim=-1)
        elif self.combine == "concat":
            combined = combined / len(states) ** 0.5
        return combined[..., None, :]


def _resolve_layers(layers: Sequence[float], depth: int) -> tuple[int, ...]:
    """Layers counted from 1, ascending, from fractions of ``depth`` (floats below 1) or counts."""
    if not layers:
        raise ValueError("layers is empty; name at least one, such as [0.25, 0.5, 0.75]")
    taps = set()
    for layer in layers:
        tap = int(layer * depth) if 0 < layer < 1 else layer
        if tap != int(tap) or not 1 <= tap <= depth:
            raise ValueError(
                f"layers names {layer}, which is layer {tap} of a network with {depth}; "
                f"give a fraction below 1, or a layer from 1 to {depth}"
            )
        taps.add(int(tap))
    return tuple(sorted(taps))


def _take(h: Tensor, index: Tensor) -> Tensor:
    """``h`` ``[B, S, width]`` at ``index`` ``[B, K, G]``: ``[B, K, G, width]``."""
    flat = index.flatten(1)[..., None].expand(-1, -1, h.shape[-1])
    return h.gather(1, flat).view(*index.shape, h.shape[-1])


def _require_finite(features: Features) -> None:
    for name in ("rollout", "target"):
        finite = getattr(features, name).isfinite()
        if not bool(finite.all()):
            where = (~finite).nonzero()[0].tolist()
            block = where[2] if name == "rollout" else where[1]
            raise FloatingPointError(
                f"non-finite {name} features at sequence {where[0]}, block {block}: the feature network overflowed; "
                "use dtype bf16 or fp32 for it and check its checkpoint"
            )
