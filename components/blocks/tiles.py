"""Block attention in two sparse parts: the prefix in tiles, by a fused kernel, and the block's own few keys, written out.

Both parts are softmaxes over disjoint keys, so they are joined by their log-sum-exps. Neighbouring anchors share a tile, and
a tile reads no key past the last of its anchors: of the prompt's keys, half are read, and no mask is ever as large as the
packed length squared.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from components.blocks.layout import PackedLayout

# Queries handled by one call of the fused kernel. More amortise the call, fewer skip more of the keys past their anchor.
_TILE_QUERIES = 256

# Queries [start, stop) of the block part, how many prompt keys they reach, and their additive mask [B, 1, queries, keys].
Tile = tuple[int, int, int, Tensor]


def prompt_mask(layout: PackedLayout) -> Tensor | None:
    """``[B, 1, L, L]`` bool for prompts of several documents; None where plain causal attention says the same."""
    if bool((layout.doc_ids == layout.doc_ids[:, :1]).all()):
        return None
    same_document = layout.doc_ids[:, :, None] == layout.doc_ids[:, None, :]
    return same_document.tril()[:, None]


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The prompt over itself, under :func:`prompt_mask`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def prefix_tiles(layout: PackedLayout, *, per_anchor: int, dtype: torch.dtype) -> list[Tile]:
    """The block queries in tiles of neighbouring anchors, ``per_anchor`` queries to each, and the prompt keys they see."""
    K = layout.anchors.shape[1]
    width = max(1, _TILE_QUERIES // per_anchor)
    tiles = []
    for first in range(0, K, width):
        last = min(first + width, K)
        anchors, docs = layout.anchors[:, first:last, None], layout.block_docs[:, first:last, None]
        keys = int(anchors.max())
        visible = (torch.arange(keys, device=anchors.device) < anchors) & (layout.doc_ids[:, None, :keys] == docs)
        visible = visible.repeat_interleave(per_anchor, dim=1)  # [B, queries, keys]
        bias = torch.zeros(visible.shape, dtype=dtype, device=anchors.device).masked_fill_(~visible, -torch.inf)
        tiles.append((first * per_anchor, last * per_anchor, keys, bias[:, None]))
    return tiles


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, N, d]`` and float32 log-sum-exp ``[B, H, N]`` of block queries over the prompt keys of their tiles.

    ``k`` and ``v`` may have fewer heads, each shared by neighbouring query heads.
    """
    out, lse = torch.empty_like(q), _wide(q.new_empty(q.shape[:-1]))
    for start, stop, keys, bias in tiles:
        # A row without any visible key would come back with a log-sum-exp of 0; every block sees its predecessor.
        attend = _fused if q.device.type == "cpu" else _written_out
        out[:, :, start:stop], lse[:, :, start:stop] = attend(q[:, :, start:stop], k[:, :, :keys], v[:, :, :keys], bias)
    return out, lse


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same on devices whose fused kernels take no such mask or keep their log-sum-exp to themselves."""
    B, H, N, d = q.shape
    shared = (q / math.sqrt(d)).view(B, k.shape[1], -1, d)  # the query heads of one key head, one after the other
    scores = _wide((shared @ k.transpose(-1, -2)).view(B, H, N, -1)) + bias
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return (weights.view(B, k.shape[1], -1, v.shape[2]) @ v).view(B, H, N, d), lse


def attend_one_token(
    q: Tensor, prompt_k: Tensor, prompt_v: Tensor, block_k: Tensor, block_v: Tensor, tiles: list[Tile]
) -> Tensor:
    """The newest token of every block over its prefix and its block so far.

    Args:
        q: ``[B, H, N, d]``, one query for each of ``N`` blocks.
        prompt_k, prompt_v: ``[B, kv_heads, L, d]``.
        block_k, block_v: ``[B, kv_heads, N, T, d]``.
        tiles: of one query per block.
    """
    B, H, N, d = q.shape
    out, lse = _attend_prefix(q, prompt_k, prompt_v, tiles)
    # [B, kv_heads, N, heads that share one, ...]: each block's own keys are multiplied once for all their query heads.
    shared = _wide(q.unflatten(1, (block_k.shape[1], -1)).transpose(2, 3))
    scores = shared @ _wide(block_k).transpose(-1, -2) / math.sqrt(d)
    own_lse = scores.logsumexp(dim=-1)
    joint = torch.logaddexp(lse.unflatten(1, (block_k.shape[1], -1)).transpose(2, 3), own_lse)
    own = (scores - joint[..., None]).exp() @ _wide(block_v)
    joint = joint.transpose(2, 3).reshape(lse.shape)
    return (out * (lse - joint).exp()[..., None] + own.transpose(2, 3).reshape(q.shape)).to(q.dtype)


class SplitAttention:
    """Packed attention in two parts, for CPUs."""

    def __init__(self, layout: PackedLayout) -> None:
        self.layout = layout
        self._prompt_mask = prompt_mask(layout)
        self._tiles: list[Tile] | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        L = self.layout.prompt_len
        prompt = attend_prompt(q[:, :, :L], k[:, :, :L], v[:, :, :L], self._prompt_mask)
        if self.layout.block_len == 0:
            return prompt
        if self._tiles is None:
            self._tiles = prefix_tiles(
                self.layout, per_anchor=self.layout.num_samples * self.layout.block_len, dtype=q.dtype
            )
        blocks = _BlockAttention.apply(q, k, v, self.layout, self._tiles)
        return torch.cat((prompt, blocks), dim=2)


class _BlockAttention(torch.autograd.Function):
    """Blocks over their prefix (fused kernel, in tiles) and over themselves (a few keys, written out).

    The joint log-sum-exp and output are all that the backward of either part needs to know of the other: its probabilities
    are ``exp(score - lse)``, its gradient correction ``sum(out * grad_out)``.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, tiles: list[Tile]) -> Tensor:
        L, G = layout.prompt_len, layout.block_len
        q_blocks = q[:, :, L:]
        out, lse = _attend_prefix(q_blocks, k[:, :, :L], v[:, :, :L], tiles)
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
