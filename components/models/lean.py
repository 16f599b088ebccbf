"""torchtune's layers with fewer passes over memory: the same parameters, the same numbers but for rounding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import FeedForward, RotaryPositionalEmbeddings, TransformerDecoder


def use_lean_layers(decoder: TransformerDecoder) -> None:
    """Put :class:`SwiGLU` and :class:`ComplexRoPE` in the place of what they equal; parameters stay the same objects."""
    ropes: dict[nn.Module, ComplexRoPE] = {}  # layers share one
    for layer in decoder.layers:
        mlp, rope = layer.mlp, layer.attn.pos_embeddings
        if type(mlp) is FeedForward and mlp.w3 is not None and type(mlp.activation) is nn.SiLU:
            layer.mlp = SwiGLU(gate_proj=mlp.w1, down_proj=mlp.w2, up_proj=mlp.w3)
        if type(rope) in (RotaryPositionalEmbeddings, Llama3ScaledRoPE):
            layer.attn.pos_embeddings = ropes.setdefault(rope, ComplexRoPE(rope))


class _GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up``. Autograd would keep the activated gate too, which is as cheap to compute again as to read."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class SwiGLU(FeedForward):
    """torchtune's gated feed-forward; of a layer's activations its are the largest, and it keeps a quarter less of them."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` to ``[..., width]``."""
        return self.w2(_GatedSiLU.apply(self.w1(x), self.w3(x)))


class ComplexRoPE(nn.Module):
    """Rotary embeddings of neighbouring pairs as one multiplication of complex numbers, in float32.

    Args:
        rope: torchtune's, whose table of cosines and sines is read.
    """

    def __init__(self, rope: RotaryPositionalEmbeddings | Llama3ScaledRoPE) -> None:
        super().__init__()
        self.rope = rope

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """``x`` ``[B, S, heads, head_dim]`` turned by the angles of ``input_pos`` ``[B, S]`` (by default 0 to S - 1)."""
        table = self.rope.cache[None, : x.shape[1]] if input_pos is None else self.rope.cache[input_pos]
        angles = torch.view_as_complex(table.float())[:, :, None]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * angles).flatten(-2).type_as(x)
