"""How one token is drawn from logits: temperature, top-k, top-p, one uniform number per draw.

A draw inverts the cumulative distribution, so the same uniform numbers give the same tokens however the batch is split,
and no random number is spent on the vocabulary (``torch.multinomial`` draws one per entry).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws from ``softmax(logits / temperature)``, cut to ``top_k`` tokens and ``top_p`` mass.

    Attributes:
        temperature: 0 takes the most likely token; its log-prob is then that at temperature 1.
        top_p: smallest share of the probability mass that is kept, most likely tokens first; 1 keeps all.
        top_k: how many tokens are kept, 0 for all.

    Raises:
        ValueError: a temperature below 0, ``top_p`` outside (0, 1], ``top_k`` below 0.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1], 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (every token) or above")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``[R, m]`` long and log-probs ``[R, m]`` float32 from logits ``[R, V]``, uniforms ``[R, m]`` in [0, 1).

        Log-probs are those of the whole distribution at ``temperature``, before top-k and top-p.
        """
        probs = (logits.float() / (self.temperature or 1.0)).softmax(dim=-1)
        if self.temperature == 0:
            tokens = logits.argmax(dim=-1, keepdim=True).expand(uniforms.shape)
        else:
            tokens = _invert(self._kept(logits, probs), uniforms)
        return tokens, probs.gather(1, tokens).log()

    def _kept(self, logits: Tensor, probs: Tensor) -> Tensor:
        """``probs`` with what top-k and top-p leave out set to 0. Ranked by logits: probabilities may round to a tie."""
        if self.top_k and self.top_k < probs.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            probs = probs.masked_fill(logits < least, 0.0)
        if self.top_p < 1:
            order = logits.argsort(dim=-1, descending=True)
            ordered = probs.gather(1, order)
            beyond = ordered.cumsum(dim=-1) - ordered >= self.top_p * ordered.sum(dim=-1, keepdim=True)
            probs = probs.masked_fill(beyond.gather(1, order.argsort(dim=-1)), 0.0)
        return probs


def _invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``uniforms``; never one of probability zero."""
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift a uniform next to 1 onto the total itself, past the last token that has any mass.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    points = torch.minimum(uniforms * total, below_total).contiguous()
    # Only logits that are not numbers lead past the vocabulary; the generator reports those.
    return torch.searchsorted(cumulative, points, right=True).clamp(max=probs.shape[-1] - 1)
