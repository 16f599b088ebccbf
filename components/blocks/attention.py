"""Attention over packed sequences, without ever forming a mask of the packed length squared.

An :class:`AttentionPattern` is passed through torchtune's decoder in the place of a mask; :func:`install` makes every
layer hand its queries, keys and values to that pattern. There are three: :class:`PackedAttention` (prompt and blocks in one
forward, differentiable), and the two halves of cached sampling, :class:`PrefillAttention` and :class:`DecodeAttention`.
The rule they share is ``PackedLayout.sees``.

On a CPU, packed attention is computed in two sparse parts, the prompt over itself and blocks over (prefix + own block), with
torch's fused CPU kernel for all that touches the prompt. On other devices it is one ``flex_attention`` with a ``BlockMask``
of the same rule.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torchtune.modules import TransformerDecoder

from components.blocks.cache import KVCache
from components.blocks.layout import PackedLayout

# Queries handled by one call of the fused kernel. More amortise the call, fewer skip more of the keys past their anchor.
_TILE_QUERIES = 256


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
            self._attend: Callable[[Tensor, Tensor, Tensor], Tensor] = _SplitAttention(layout)
        else:
            self._attend = functools.partial(_flex, flex_mask(layout))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q, k, v)


class PrefillAttention:
    """The prompt over itself, keeping its keys and values for :class:`DecodeAttention`."""

    def __init__(self, layout: PackedLayout, cache: KVCache) -> None:
        assert layout.block_len == 0
        self.cache = cache
        self._mask = _prompt_mask(layout)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.store_prompt(layer, k, v)
        return _attend_prompt(q, k, v, self._mask)


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
        prefix = _prefix_mask(layout, first=0, last=layout.anchors.shape[1], keys=layout.prompt_len)  # [B, K, L]
        blocks = prefix.repeat_interleave(layout.num_samples, dim=1)  # [B, K*n, L]
        self._hidden = ~blocks[:, None, None]  # over key/value heads and the query heads that share one

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        prompt_k, prompt_v, block_k, block_v = self.cache.append(layer, self.step, k, v)
        B, H, N, d = q.shape
        kv_heads = prompt_k.shape[1]
        q = q.view(B, kv_heads, H // kv_heads, N, d) / math.sqrt(d)
        prefix = (q.flatten(2, 3) @ prompt_k.transpose(-1, -2)).view(B, kv_heads, -1, N, prompt_k.shape[2])
        prefix = prefix.masked_fill(self._hidden, -torch.inf)
        own = torch.einsum("bhrnd,bhntd->bhrnt", q, block_k)
        weights = torch.cat((prefix, own), dim=-1).float().softmax(dim=-1).to(v.dtype)
        prefix, own = weights.split((prompt_k.shape[2], block_k.shape[3]), dim=-1)
        out = (prefix.flatten(2, 3) @ prompt_v).view(q.shape) + torch.einsum("bhrnt,bhntd->bhrnd", own, block_v)
        return out.reshape(B, H, N, d)


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


def _prefix_mask(layout: PackedLayout, *, first: int, last: int, keys: int) -> Tensor:
    """``[B, last - first, keys]`` bool: which of the first ``keys`` prompt tokens the blocks at these anchors see."""
    anchors, docs = layout.anchors[:, first:last, None], layout.block_docs[:, first:last, None]
    index = torch.arange(keys, device=anchors.device)
    return (index < anchors) & (layout.doc_ids[:, None, :keys] == docs)


def _prompt_mask(layout: PackedLayout) -> Tensor | None:
    """``[B, 1, L, L]`` bool for prompts of several documents; None where plain causal attention says the same."""
    if bool((layout.doc_ids == layout.doc_ids[:, :1]).all()):
        return None
    same_document = layout.doc_ids[:, :, None] == layout.doc_ids[:, None, :]
    return same_document.tril()[:, None]


def _attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


class _SplitAttention:
    """Packed attention in two parts, for CPUs."""

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self._prompt_mask = _prompt_mask(layout)
        self._tiles: list[_Tile] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        L = self.layout.prompt_len
        prompt = _attend_prompt(q[:, :, :L], k[:, :, :L], v[:, :, :L], self._prompt_mask)
        if self.layout.block_len == 0:
            return prompt
        if self._tiles is None:
            self._tiles = _tiles(self.layout, q.dtype)
        blocks = _BlockAttention.apply(q, k, v, self.layout, self._tiles)
        return torch.cat((prompt, blocks), dim=2)


# Queries [start, stop) of the block part, how many prompt keys they reach, and their additive mask [B, 1, queries, keys].
_Tile = tuple[int, int, int, Tensor]


def _tiles(layout: PackedLayout, dtype: torch.dtype) -> list[_Tile]:
    """Neighbouring anchors share a call of the kernel, which then reads no key past the last of their anchors."""
    per_anchor = layout.num_samples * layout.block_len
    K = layout.anchors.shape[1]
    width = max(1, _TILE_QUERIES // per_anchor)
    tiles = []
    for first in range(0, K, width):
        last = min(first + width, K)
        keys = int(layout.anchors[:, first:last].max())
        visible = _prefix_mask(layout, first=first, last=last, keys=keys).repeat_interleave(per_anchor, dim=1)
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        tiles.append((first * per_anchor, last * per_anchor, keys, bias[:, None]))
    return tiles


class _BlockAttention(torch.autograd.Function):
    """Blocks over their prefix (fused kernel, in tiles) and over themselves (a few keys, written out).

    Both parts are softmaxes over disjoint keys, so they are joined by their log-sum-exps. The joint log-sum-exp and output
    are also all that the backward of either part needs to know of the other: its probabilities are
    ``exp(score - lse)``, its gradient correction ``sum(out * grad_out)``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, tiles: list[_Tile]) -> Tensor:
        L, G = layout.prompt_len, layout.block_len
        q_blocks = q[:, :, L:]
        out, lse = torch.empty_like(q_blocks), _wide(q_blocks.new_empty(q_blocks.shape[:-1]))
        for start, stop, keys, bias in tiles:
            # A row without any visible key would come back with a log-sum-exp of 0; every block sees its predecessor.
            out[:, :, start:stop], lse[:, :, start:stop] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q_blocks[:, :, start:stop], k[:, :, :keys], v[:, :, :keys], attn_mask=bias
            )
        scores = _own_scores(q_blocks, k[:, :, L:], G)
        joint = torch.logaddexp(lse, scores.logsumexp(dim=-1).flatten(2))
        own = (scores - _per_block(joint, G)[..., None]).exp() @ _wide(_per_block(v[:, :, L:], G))
        out = out * (lse - joint).exp()[..., None] + own.flatten(2, 3)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, joint)
        ctx.layout, ctx.tiles = layout, tiles
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_out,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        L, G = ctx.layout.prompt_len, ctx.layout.block_len
        q_blocks = q[:, :, L:]
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, stop, keys, bias in ctx.tiles:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, start:stop],
                q_blocks[:, :, start:stop],
                k[:, :, :keys],
                v[:, :, :keys],
                out[:, :, start:stop],
                lse[:, :, start:stop],
                0.0,
                False,
                attn_mask=bias,
            )
            grad_q[:, :, L + start : L + stop] = dq
            grad_k[:, :, :keys] += dk
            grad_v[:, :, :keys] += dv
        d_out = _wide(_per_block(grad_out, G))
        probs = (_own_scores(q_blocks, k[:, :, L:], G) - _per_block(lse, G)[..., None]).exp()
        correction = (d_out * _wide(_per_block(out, G))).sum(dim=-1, keepdim=True)
        d_scores = probs * (d_out @ _wide(_per_block(v[:, :, L:], G)).transpose(-1, -2) - correction)
        d_scores = d_scores / math.sqrt(q.shape[-1])
        grad_q[:, :, L:] += (d_scores @ _wide(_per_block(k[:, :, L:], G))).flatten(2, 3).to(q.dtype)
        grad_k[:, :, L:] = (d_scores.transpose(-1, -2) @ _wide(_per_block(q_blocks, G))).flatten(2, 3)
        grad_v[:, :, L:] = (probs.transpose(-1, -2) @ d_out).flatten(2, 3)
        return grad_q, grad_k, grad_v, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_block(x: Tensor, block_len: int) -> Tensor:
    """``[B, H, blocks * G, ...]`` to ``[B, H, blocks, G, ...]``."""
    return x.unflatten(2, (-1, block_len))


def _own_scores(q: Tensor, k: Tensor, block_len: int) -> Tensor:
    """``[B, H, blocks, G, G]``, float32 or wider: scaled causal scores of every block over itself."""
    q, k = _wide(_per_block(q, block_len)), _wide(_per_block(k, block_len))
    later = torch.ones(block_len, block_len, dtype=torch.bool, device=q.device).triu(1)
    return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(later, -torch.inf)
