"""Log-probs of tokens from hidden states, without ever holding the logits of more than a few rows.

The vocabulary is most of the memory of a small model's step and an eighth of its arithmetic. Logits are formed in chunks of
rows, read, and dropped; the backward forms them again and turns them into their own gradient in place.
"""

from typing import Any

import torch
from torch import Tensor

# Elements of the largest logits tensor that is ever formed; the vocabulary decides how many rows that is. In float32 they
# stay just below 32 MiB, the largest block that glibc can be told to keep for the next chunk.
LOGITS_ELEMENTS = 8_000_000


def chunks(rows: int, vocab_size: int) -> list[slice]:
    """Slices of ``rows`` whose logits fit ``LOGITS_ELEMENTS``."""
    size = max(1, LOGITS_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class TokenLogprobs(torch.autograd.Function):
    """``log_softmax(hidden @ weight.T)`` at some tokens: ``[R, m]`` float32 from ``[R, width]``, ``[V, width]``, ``[R, m]``.

    Everything is float32, whatever the model computes in: a product in bfloat16 would leave a log-prob 8 bits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, tokens)
        wide, out = weight.float(), torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
        for rows in chunks(len(hidden), len(weight)):
            out[rows] = (hidden[rows].float() @ wide.T).log_softmax(dim=-1).gather(1, tokens[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, tokens = ctx.saved_tensors
        wide = weight.float()
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        for rows in chunks(len(hidden), len(weight)):
            h, g = hidden[rows].float(), grad[rows]
            d_logits = (h @ wide.T).softmax(dim=-1).mul_(-g.sum(dim=-1, keepdim=True)).scatter_add_(1, tokens[rows], g)
            if grad_hidden is not None:
                grad_hidden[rows] = (d_logits @ wide).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(d_logits.T, h)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None
