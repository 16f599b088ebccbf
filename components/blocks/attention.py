"""Attention over packed sequences, without ever forming a mask of the packed length squared.

An :class:`AttentionPattern` is passed through torchtune's decoder in the place of a mask; :func:`install` makes every
layer hand its queries, keys and values to that pattern. There are three: :class:`PackedAttention` (prompt and blocks in one
forward, differentiable), and the two halves of cached sampling, :class:`PrefillAttention` and :class:`DecodeAttention`.
The rule they share is ``PackedLayout.sees``.

On a CPU, packed attention is computed in two sparse parts (``components.blocks.tiles``). On other devices it is one
``flex_attention`` with a ``BlockMask`` of the same rule.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torchtune.modules import TransformerDecoder

from components.blocks.cache import KVCache
from components.blocks.layout import PackedLayout
from components.blocks.tiles import SplitAttention, attend_one_token, attend_prompt, prefix_tiles, prompt_mask


class AttentionPattern(Protocol):
    """Who sees whom in one forward: all heads of ``q, k, v`` (``[B, H, S, head_dim]``) of a layer to its output."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def install(decoder: TransformerDecoder) -> None:
    """Let every layer of a torchtune decoder take an :class:`AttentionPattern` as its mask (other masks work as before)."""
    for index, layer in enumerate(decoder.layers):
        inner = layer.attn._attention_call
        if not (isinstance(inner, functools.partial) and inner.func is _attention_call):
            layer.attn._attention_call = functools.partial(_attention_call, inner, index)


def _attention_call(
    inner: Callable[..., Tensor], layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **kwargs: Any
) -> Tensor:
    if isinstance(mask, (PackedAttention, PrefillAttention, DecodeAttention)):
        return mask(layer, q, k, v)
    return inner(q, k, v, mask=mask, **kwargs)


class PackedAttention:
    """Prompt and blocks in one differentiable forward; masks are built once and shared by all layers."""

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        if layout.doc_ids.device.type == "cpu":
            self._attend: Callable[[Tensor, Tensor, Tensor], Tensor] = SplitAttention(layout)
        else:
            self._attend = functools.partial(_flex, flex_mask(layout))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)


class PrefillAttention:
    """The prompt over itself, keeping its keys and values for :class:`DecodeAttention`."""

    def __init__(self, layout: PackedLayout, cache: KVCache) -> None:
        assert layout.block_len == 0
        self.cache = cache
        self._mask = prompt_mask(layout)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store_prompt(layer, k, v)
        return attend_prompt(q, k, v, self._mask)


class DecodeAttention:
    """One new token per block, ordered as in the layout, over the cached prefix and the cached block.

    Args:
        layout: of the blocks being sampled.
        cache: holds the prompt, and the blocks up to ``step`` tokens.
        step: how many tokens of each block are cached already.
    """

    def __init__(self, layout: PackedLayout, cache: KVCache, step: int) -> None:
        self.cache = cache
        self.step = step
        self._tiles = prefix_tiles(layout, per_anchor=layout.num_samples, dtype=cache.dtype)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt_k, prompt_v, block_k, block_v = self.cache.append(layer, self.step, k, v)
        return attend_one_token(q, prompt_k, prompt_v, block_k, block_v, self._tiles)


def flex_mask(layout: PackedLayout) -> BlockMask:
    """``layout``'s rule as a ``BlockMask``, for devices where ``flex_attention`` is compiled."""
    B, K = layout.anchors.shape
    S = layout.prompt_len + K * layout.num_samples * layout.block_len
    return create_block_mask(
        lambda b, h, row, column: layout.sees(b, row, column), B, None, S, S, device=str(layout.anchors.device)
    )


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _flex(mask: BlockMask, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=mask)
