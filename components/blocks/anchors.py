"""Where blocks start: the positions at which the policy continues the ground truth (paper, strided block-parallel sampling).

A block at anchor ``a`` sees ``tokens[:a]`` and is compared with the window ``tokens[a:a+G]``. Which positions are anchors,
and which of them count, is decided here and nowhere else.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from components.types import Batch


@dataclass(frozen=True, kw_only=True)
class AnchorSet:
    """Anchors of a batch.

    Attributes:
        positions: ``[B, K]`` long, at least 1.
        mask: ``[B, K]`` bool; False where the block does not count. Such a block is still computed, so that shapes (and
            the collective calls of other ranks) do not depend on the data, but it contributes to nothing.
    """

    positions: Tensor
    mask: Tensor


class Anchors(Protocol):
    """Chooses the anchors of a batch for rollouts of ``rollout_len`` tokens."""

    def __call__(self, batch: Batch, rollout_len: int) -> AnchorSet: ...


class StridedAnchors:
    """Every ``stride`` tokens, from ``context_len`` on: ``a_k = context_len + k * stride``.

    ``K = (L - rollout_len - context_len) // stride + 1`` for every row. A block counts if its window holds no padding and

    - with ``region="target"``, every token of the window is learned from (``batch.target_mask``);
    - with ``document_mask``, its window and at least ``context_len`` tokens before it lie in one document. Without it a
      block may start in one document and be compared with tokens of the next.

    Blocks that do not count cost as much as others. Where few do, as with short answers to long questions, ``max_anchors``
    spares them: a row then has that many anchors, first of all those whose block counts, evenly spread if there are more.

    Args:
        stride: tokens between anchors (paper: 8 for code, 2 for translation).
        context_len: shortest prefix a block sees (paper: 8 for code, 4 for translation).
        region: ``"all"`` positions, or only the ``"target"`` (answers, not questions).
        document_mask: leave out blocks that straddle documents.
        max_anchors: ``K`` at most, chosen row by row; None for all.

    Raises:
        ValueError: ``stride``, ``context_len`` or ``max_anchors`` below 1, an unknown ``region``, or (when called) rows too
            short for a block.
    """

    def __init__(
        self,
        *,
        stride: int,
        context_len: int,
        region: Literal["all", "target"] = "all",
        document_mask: bool = False,
        max_anchors: int | None = None,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride is {stride}; anchors need a stride of at least 1 token")
        if context_len < 1:
            raise ValueError(f"context_len is {context_len}; a block needs a prefix of at least 1 token")
        if region not in ("all", "target"):
            raise ValueError(f"region is {region!r}; choose 'all' or 'target'")
        if max_anchors is not None and max_anchors < 1:
            raise ValueError(f"max_anchors is {max_anchors}; keep at least 1 anchor, or leave it out for all")
        self.stride = stride
        self.context_len = context_len
        self.region = region
        self.document_mask = document_mask
        self.max_anchors = max_anchors

    def __call__(self, batch: Batch, rollout_len: int) -> AnchorSet:
        """The anchors of ``batch``, in ascending order."""
        B, L = batch.tokens.shape
        num_anchors = (L - rollout_len - self.context_len) // self.stride + 1
        if num_anchors < 1:
            raise ValueError(
                f"rows of {L} tokens have no room for a block: context_len {self.context_len} + rollout_len {rollout_len} "
                f"= {self.context_len + rollout_len}; lengthen dataset.seq_len or shorten one of the two"
            )
        positions = self.context_len + self.stride * torch.arange(num_anchors, device=batch.tokens.device)
        window = positions[:, None] + torch.arange(rollout_len, device=batch.tokens.device)  # [K, G]
        mask = (batch.doc_ids[:, window] >= 0).all(dim=-1)
        if self.region == "target":
            mask &= batch.target_mask[:, window].all(dim=-1)
        if self.document_mask:
            reach = torch.arange(-self.context_len, rollout_len, device=batch.tokens.device)
            documents = batch.doc_ids[:, positions[:, None] + reach]  # [B, K, context_len + G]
            mask &= (documents == documents[..., :1]).all(dim=-1)
        positions = positions.expand(B, num_anchors).contiguous()
        if self.max_anchors is not None and self.max_anchors < num_anchors:
            kept = _counted_first(mask, self.max_anchors)
            positions, mask = positions.gather(1, kept), mask.gather(1, kept)
        return AnchorSet(positions=positions, mask=mask)


def _counted_first(mask: Tensor, size: int) -> Tensor:
    """Indices of ``size`` columns in each row, ascending, ``[B, size]``: True ones, evenly spread, then others."""
    ranked = torch.argsort(~mask, dim=1, stable=True)
    place = torch.arange(size, device=mask.device)
    counted = mask.sum(dim=1, keepdim=True)
    spread = torch.where(counted > size, place * counted // size, place)
    return ranked.gather(1, spread).sort(dim=1).values


class CompletionAnchor:
    """One anchor per row, at the end of its prompt: the first token of ``batch.target_mask``, or the end of the text.

    With it a rollout is a whole completion (give the generator stop tokens), which is what RLVR, whole-completion EBFT
    and evaluation need. A row holds one record.
    """

    def __call__(self, batch: Batch, rollout_len: int) -> AnchorSet:
        """The anchors of ``batch``, ``K = 1``; a row with an empty prompt does not count."""
        has_target = batch.target_mask.any(dim=1)
        first_target = batch.target_mask.to(torch.int64).argmax(dim=1)
        length = (batch.doc_ids >= 0).sum(dim=1)
        positions = torch.where(has_target, first_target, length)[:, None]
        return AnchorSet(positions=positions.clamp(min=1), mask=positions >= 1)
