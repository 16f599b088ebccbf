"""Keys and values of one rollout, kept between the prefill of the prompt and the decode steps of its blocks.

The prompt is stored once for all samples. A cache lives as long as the rollout it serves and belongs to no module.
"""

import torch
from torch import Tensor


class KVCache:
    """Per layer: the prompt's keys and values, and those of every block as it grows.

    Args:
        kv_heads: distinct key/value heads. torchtune hands them over repeated for every query head; one of each is kept.
        block_len: tokens that a block can hold.
    """

    def __init__(self, *, kv_heads: int, block_len: int) -> None:
        self.kv_heads = kv_heads
        self.block_len = block_len
        self._prompt: dict[int, tuple[Tensor, Tensor]] = {}
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values it holds."""
        return self._prompt[0][0].dtype

    def _distinct(self, x: Tensor) -> Tensor:
        return x[:, :: x.shape[1] // self.kv_heads]

    def store_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep the prompt's ``k, v`` ``[B, H, L, head_dim]``."""
        self._prompt[layer] = (self._distinct(k).contiguous(), self._distinct(v).contiguous())

    def append(self, layer: int, step: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep ``k, v`` ``[B, H, N, head_dim]`` as token ``step`` of the ``N`` blocks.

        Returns:
            The prompt's keys and values, ``[B, kv_heads, L, head_dim]``, and the blocks', ``[B, kv_heads, N, step + 1,
            head_dim]``.
        """
        k, v = self._distinct(k), self._distinct(v)
        if layer not in self._blocks:
            B, H, N, d = k.shape
            self._blocks[layer] = (k.new_empty(B, H, N, self.block_len, d), v.new_empty(B, H, N, self.block_len, d))
        block_k, block_v = self._blocks[layer]
        block_k[:, :, :, step], block_v[:, :, :, step] = k, v
        return *self._prompt[layer], block_k[:, :, :, : step + 1], block_v[:, :, :, : step + 1]
