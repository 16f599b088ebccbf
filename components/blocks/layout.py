"""The one place that knows in which order a packed sequence stands, and which of its tokens see which.

A packed sequence is ``[prompt | blocks]``: the ``L`` ground-truth tokens once, then ``K * n`` blocks of ``G`` tokens,
anchor-major::

    index(anchor k, sample j, token g) = L + (k * n + j) * G + g

so that the samples of one anchor, which share a prefix, are neighbours. Everywhere else block tensors are ``[B, n, K, G]``.
The rule of visibility (paper, figure 2): a prompt token sees the prompt up to itself; a block token sees the prompt below
its anchor and its own block up to itself; neither sees another document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """Shape and order of one packed batch.

    Attributes:
        doc_ids: ``[B, L]`` long, of the prompt.
        anchors: ``[B, K]`` long, each at least 1.
        num_samples: ``n``, blocks per anchor.
        block_len: ``G``, tokens per block; 0 for the prompt alone.
    """

    doc_ids: Tensor
    anchors: Tensor
    num_samples: int
    block_len: int

    @property
    def prompt_len(self) -> int:
        """``L``."""
        return self.doc_ids.shape[1]

    @property
    def block_docs(self) -> Tensor:
        """``[B, K]`` long, the document a block continues: that of the token before its anchor."""
        return self.doc_ids.gather(1, self.anchors - 1)

    def pack(self, prompt: Tensor, blocks: Tensor) -> Tensor:
        """``[B, L]`` and ``[B, n, K, G]`` to the packed ``[B, L + K*n*G]``."""
        return torch.cat((prompt, blocks.transpose(1, 2).flatten(1)), dim=1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The blocks of a packed ``[B, L + K*n*G, ...]`` as ``[B, n, K, G, ...]``."""
        B, K = self.anchors.shape
        blocks = packed[:, self.prompt_len :]
        return blocks.reshape(B, K, self.num_samples, self.block_len, *packed.shape[2:]).transpose(1, 2)

    def positions(self) -> Tensor:
        """``[B, L + K*n*G]`` long: token ``g`` of a block stands ``g`` after its anchor."""
        B, K = self.anchors.shape
        device = self.anchors.device
        prompt = torch.arange(self.prompt_len, device=device).expand(B, -1)
        steps = torch.arange(self.block_len, device=device)
        blocks = (self.anchors[:, None, :, None] + steps).expand(B, self.num_samples, K, self.block_len)
        return self.pack(prompt, blocks)

    def visibility(self) -> Tensor:
        """``[B, S, S]`` bool, True where the row's token sees the column's: the rule itself, quadratic.

        Nothing in training calls this. Tests hold every attention path against it.
        """
        B, K = self.anchors.shape
        S = self.prompt_len + K * self.num_samples * self.block_len
        index = torch.arange(S, device=self.anchors.device)
        batch = torch.arange(B, device=self.anchors.device)[:, None, None]
        return self.sees(batch, index[None, :, None], index[None, None, :])

    def sees(self, b: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The rule of visibility for packed indices ``row`` and ``column`` of sequence ``b``; all three broadcast.

        Written with plain tensor arithmetic, so that ``flex_attention`` can trace it as a ``mask_mod``.
        """
        L, last = self.prompt_len, self.prompt_len - 1
        if self.block_len == 0:
            return (column <= row) & (self.doc_ids[b, row] == self.doc_ids[b, column])
        block_row = (row - L).clamp(min=0) // self.block_len
        block_column = (column - L).clamp(min=0) // self.block_len
        anchor = torch.where(row < L, row + 1, self.anchors[b, block_row // self.num_samples])
        same_document = self.doc_ids[b, anchor - 1] == self.doc_ids[b, column.clamp(max=last)]
        sees_prompt = (column < L) & (column < anchor) & same_document
        sees_own_block = (row >= L) & (column >= L) & (block_row == block_column) & (column <= row)
        return sees_prompt | sees_own_block


def target_windows(anchors: Tensor, rollout_len: int, prompt_len: int) -> tuple[Tensor, Tensor]:
    """Indices of the ground truth that stands where the rollouts do.

    Args:
        anchors: ``[B, K]`` long.
        rollout_len: ``G``.
        prompt_len: ``L``.

    Returns:
        ``[B, K, G]`` long, clamped into the prompt, and ``[B, K, G]`` bool, False where the window runs past it.
    """
    window = anchors[:, :, None] + torch.arange(rollout_len, device=anchors.device)
    return window.clamp(max=prompt_len - 1), window < prompt_len
