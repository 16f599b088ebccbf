"""Log-probs of tokens from hidden states, without ever holding the logits of more than a few rows.

The vocabulary is most of the memory of a small model's step and an eighth of its arithmetic. Logits are formed in chunks of
rows and read; the first ``KEPT_ELEMENTS`` wait for the backward, which forms the others again, and turns them into their own
gradient in place.
"""

from typing import Any

import torch
from torch import Tensor

# Elements of the largest logits tensor that is ever formed; the vocabulary decides how many rows that is. In float32 they
# stay just below 32 MiB, the largest block that glibc can be told to keep for the next chunk.
LOGITS_ELEMENTS = 8_000_000
# Elements of all log-softmaxes that are kept for the backward: 256 MiB, which spares short texts a product of four.
KEPT_ELEMENTS = 64_000_000


def chunks(rows: int, vocab_size: int) -> list[slice]:
    """Slices of ``rows`` whose logits fit ``LOGITS_ELEMENTS``."""
    size = max(1, LOGITS_ELEMENTS // vocab_size)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def token_logprobs(weight: Tensor, *groups: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """``log_softmax(hidden @ weight.T)`` at some tokens, for several groups of rows that share a head.

    Everything is float32, whatever the model computes in: a product in bfloat16 would leave a log-prob 8 bits.

    Args:
        weight: ``[V, width]``.
        groups: pairs of ``hidden`` ``[R, width]`` and ``tokens`` ``[R, m]`` long.

    Returns:
        ``[R, m]`` float32 for each group.
    """
    return _TokenLogprobs.apply(weight, *(tensor for group in groups for tensor in group))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        wide, outs = weight.float(), []
        ctx.kept, room = [], KEPT_ELEMENTS if any(ctx.needs_input_grad) else 0
        for hidden, tokens in zip(flat[::2], flat[1::2], strict=True):
            out = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
            for rows in chunks(len(hidden), len(weight)):
                logprobs = (hidden[rows].float() @ wide.T).log_softmax(dim=-1)
                out[rows] = logprobs.gather(1, tokens[rows])
                room -= logprobs.numel()
                ctx.kept.append(logprobs if room >= 0 else None)
            outs.append(out)
        ctx.save_for_backward(weight, *flat)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, *flat = ctx.saved_tensors
        wide, grad_weight = weight.float(), None
        grad_flat: list[Tensor | None] = []
        kept = iter(ctx.kept)
        for hidden, tokens, grad in zip(flat[::2], flat[1::2], grads, strict=True):
            grad_flat += [None, None]
            parts = [(part, next(kept)) for part in chunks(len(hidden), len(weight))]
            if grad is None:
                continue
            grad_flat[-2] = grad_hidden = torch.zeros_like(hidden)
            for part, logprobs in parts:
                # Blocks that do not count, or whose advantage is 0, have nothing to say.
                active = grad[part].any(dim=-1).nonzero()[:, 0]
                if not len(active):
                    continue
                rows = part.start + active
                h, g = hidden[rows].float(), grad[rows]
                if logprobs is None:
                    d_logits = (h @ wide.T).softmax(dim=-1)
                else:
                    d_logits = (logprobs if len(active) == len(logprobs) else logprobs[active]).exp()
                d_logits.mul_(-g.sum(dim=-1, keepdim=True)).scatter_add_(1, tokens[rows], g)
                grad_hidden[rows] = (d_logits @ wide).to(hidden.dtype)
                if not ctx.needs_input_grad[0]:
                    continue
                grad_weight = d_logits.T @ h if grad_weight is None else grad_weight.addmm_(d_logits.T, h)
        if grad_weight is None and ctx.needs_input_grad[0]:
            grad_weight = torch.zeros_like(wide)
        return None if grad_weight is None else grad_weight.to(weight.dtype), *grad_flat
