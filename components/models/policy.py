"""The language model as the pipeline sees it: log-probs of rollouts, and the two calls that draw them.

``Policy`` is the FSDP root. Its methods ``forward``, ``prefill``, ``decode``, ``read`` and ``entropies`` are the only places
where its weights are read, so each can run inside FSDP's hooks (``components.training.distributed`` registers all but the
first).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerDecoder
from torchtune.modules.tied_linear import TiedLinear

from components.blocks import (
    AttentionPattern,
    DecodeAttention,
    KVCache,
    PackedAttention,
    PackedLayout,
    PrefillAttention,
    install,
)
from components.models.decoder import hidden_states, read_packed
from components.models.head import chunks, token_logprobs
from components.models.lean import use_lean_layers
from components.types import Batch, Logprobs, Rollouts

# Draws tokens [R, m] and their log-probs [R, m] from logits [R, V], with one uniform number [R, m] per draw.
Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Drawn(NamedTuple):
    """One drawn token per block: ``tokens`` ``[B, n, K]`` long and ``logprobs`` ``[B, n, K]`` float32."""

    tokens: Tensor
    logprobs: Tensor


class Policy(nn.Module):
    """A torchtune decoder that scores and draws blocks.

    Args:
        decoder: from :func:`components.models.load_decoder` or any torchtune builder; used in place, not copied.
    """

    def __init__(self, decoder: TransformerDecoder) -> None:
        super().__init__()
        self.decoder = decoder
        install(decoder)
        use_lean_layers(decoder)

    def forward(self, batch: Batch, rollouts: Rollouts, temperature: float, with_target: bool = False) -> Logprobs:
        """Log-probs of every rollout token, from one packed forward.

        The first token of a block is predicted by the last token of its prefix, the others by their predecessor in the
        block. A block's last token predicts nothing and is left out of the packed sequence.

        Args:
            batch: ``[B, L]`` ground truth.
            rollouts: ``[B, n, K, G]`` blocks at its anchors.
            temperature: what the logits of rollout tokens are divided by; the rollouts' own (above 0).
            with_target: also give the log-probs of the ground truth (at temperature 1).

        Raises:
            ValueError: a temperature of 0 or below, or positions past what the model was built for.
        """
        if temperature <= 0:
            raise ValueError(f"log-probs at temperature {temperature} are not defined; give one above 0")
        layout, h = self._read_blocks(batch, rollouts)
        # A block's first token is predicted by its prefix, once for all samples; the others in the block.
        first = (
            _gather(h, rollouts.anchors - 1).float() / temperature,
            rollouts.tokens[..., 0].transpose(1, 2),
        )  # [B, K, n]
        later = layout.unpack(h).float() / temperature, rollouts.tokens[..., 1:, None]
        groups = [first, later]
        if with_target:
            groups.append((h[:, : layout.prompt_len - 1], batch.tokens[:, 1:, None]))
        logprobs = self._logprobs(groups)
        rollout = torch.cat((logprobs[0].transpose(1, 2)[..., None], logprobs[1][..., 0]), dim=-1)
        return Logprobs(rollout=rollout, target=logprobs[2][..., 0].clone() if with_target else None)

    @torch.no_grad()
    def prefill(self, batch: Batch, layout: PackedLayout, cache: KVCache, uniforms: Tensor, draw: Draw) -> Drawn:
        """Read the prompt once, keep its keys and values, and draw the first token of every block.

        Args:
            batch: ``[B, L]`` ground truth.
            layout: of the blocks to draw.
            cache: empty.
            uniforms: ``[B, n, K]`` in [0, 1).
            draw: how tokens are drawn from logits.
        """
        prompt = PackedLayout(
            doc_ids=batch.doc_ids, anchors=layout.anchors, num_samples=layout.num_samples, block_len=0
        )
        h = self._hidden(batch.tokens, prompt.positions(), PrefillAttention(prompt, cache))
        tokens, logprobs = self._draw(_gather(h, layout.anchors - 1), uniforms.transpose(1, 2), draw)  # [B, K, n]
        return Drawn(tokens.transpose(1, 2), logprobs.transpose(1, 2))

    @torch.no_grad()
    def decode(
        self, tokens: Tensor, step: int, layout: PackedLayout, cache: KVCache, uniforms: Tensor, draw: Draw
    ) -> Drawn:
        """Append ``tokens`` to their blocks and draw the next.

        Args:
            tokens: ``[B, n, K]`` long, token ``step`` of every block.
            step: 0 for the first call.
            layout: as given to :meth:`prefill`.
            cache: as left by :meth:`prefill` and the calls before.
            uniforms: ``[B, n, K]`` in [0, 1).
            draw: how tokens are drawn from logits.
        """
        B, n, K = tokens.shape
        # Anchor-major, as in the packed layout.
        positions = (layout.anchors[:, :, None] + step).expand(B, K, n).flatten(1)
        pattern = DecodeAttention(layout, cache, step)
        h = self._hidden(tokens.transpose(1, 2).flatten(1), positions, pattern).view(B, K, n, -1)
        drawn, logprobs = self._draw(h, uniforms.transpose(1, 2)[..., None], draw)
        return Drawn(drawn[..., 0].transpose(1, 2), logprobs[..., 0].transpose(1, 2))

    @torch.no_grad()
    def read(self, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]) -> tuple[PackedLayout, list[Tensor]]:
        """As a feature network: the layout of the packed sequence, and ``[B, S, width]`` after each of the layers ``taps``."""
        return read_packed(self.decoder, batch, rollouts, taps)

    @torch.no_grad()
    def entropies(self, batch: Batch, rollouts: Rollouts, temperatures: Sequence[float]) -> Tensor:
        """Entropy in nats of the distribution that each rollout token was, or could have been, drawn from.

        Returns:
            ``[len(temperatures), B, n, K, G]`` float32.
        """
        layout, h = self._read_blocks(batch, rollouts)
        first, later = _gather(h, rollouts.anchors - 1), layout.unpack(h)  # [B, K, width], [B, n, K, G-1, width]
        first = first[:, None, :, None].expand(*later.shape[:3], 1, -1)
        rows = torch.cat((first, later), dim=3).flatten(0, -2)
        parts = []
        for r in self._chunks(len(rows)):
            logits = self._logits(rows[r])
            logprobs = [(logits / temperature).log_softmax(dim=-1) for temperature in temperatures]
            parts.append(torch.stack([-(p.exp() * p).sum(dim=-1) for p in logprobs]))
        return torch.cat(parts, dim=1).view(len(temperatures), *rollouts.tokens.shape)

    @property
    def kv_heads(self) -> int:
        """Distinct key/value heads, for the cache."""
        return self.decoder.layers[0].attn.num_kv_heads

    def check_length(self, length: int) -> None:
        """Refuse sequences that reach past what rope was built for.

        Raises:
            ValueError: ``length`` exceeds the decoder's ``max_seq_len``.
        """
        if length > self.decoder.max_seq_len:
            raise ValueError(
                f"sequence and rollout reach position {length}, the model was built for {self.decoder.max_seq_len}; "
                "shorten dataset.seq_len or generator.rollout_len"
            )

    def _read_blocks(self, batch: Batch, rollouts: Rollouts) -> tuple[PackedLayout, Tensor]:
        """Hidden states of prompt and blocks, without the blocks' last tokens, and the layout they stand in."""
        _, n, _, G = rollouts.tokens.shape
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=rollouts.anchors, num_samples=n, block_len=G - 1)
        packed = layout.pack(batch.tokens, rollouts.tokens[..., :-1])
        return layout, self._hidden(packed, layout.positions(), PackedAttention(layout))

    def _hidden(self, tokens: Tensor, positions: Tensor, pattern: AttentionPattern) -> Tensor:
        decoder = self.decoder
        (h,) = hidden_states(decoder, tokens, positions, pattern, taps=(len(decoder.layers),))
        return decoder.norm(h)

    def _head(self) -> Tensor | None:
        """The head's matrix ``[V, width]``; None if it is more than a matrix (LoRA on the head)."""
        output = self.decoder.output
        if isinstance(output, TiedLinear):
            return output.tied_module.weight
        return output.weight if type(output) is nn.Linear else None

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[R, V]``."""
        head = self._head()
        return self.decoder.output(hidden).float() if head is None else F.linear(hidden.float(), head.float())

    def _logprobs(self, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Log-probs ``[..., m]`` float32 of ``tokens`` ``[..., m]`` given ``hidden`` ``[..., width]``, for pairs of the two."""
        rows = [(hidden.flatten(0, -2), tokens.flatten(0, -2)) for hidden, tokens in groups]
        head = self._head()
        if head is not None:
            flat = token_logprobs(head, *rows)
        else:
            flat = tuple(self._checkpointed_logprobs(hidden, tokens) for hidden, tokens in rows)
        return [logprobs.view(tokens.shape) for logprobs, (_, tokens) in zip(flat, groups, strict=True)]

    def _checkpointed_logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What ``token_logprobs`` does, for a head that is a module of its own."""

        def chunk(hidden: Tensor, tokens: Tensor) -> Tensor:
            return self._logits(hidden).log_softmax(dim=-1).gather(1, tokens)

        parts = [checkpoint(chunk, hidden[r], tokens[r], use_reentrant=False) for r in self._chunks(len(hidden))]
        return torch.cat(parts) if parts else hidden.new_zeros(tokens.shape, dtype=torch.float32)

    def _draw(self, hidden: Tensor, uniforms: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """``draw`` over rows ``hidden`` ``[..., width]`` and ``uniforms`` ``[..., m]``, in chunks."""
        rows, flat = hidden.flatten(0, -2), uniforms.flatten(0, -2)
        parts = [draw(self._logits(rows[r]), flat[r]) for r in self._chunks(len(rows))]
        tokens, logprobs = (torch.cat(part).view(uniforms.shape) for part in zip(*parts, strict=True))
        return tokens, logprobs

    def _chunks(self, rows: int) -> list[slice]:
        return chunks(rows, self.decoder.tok_embeddings.num_embeddings)


def _gather(h: Tensor, index: Tensor) -> Tensor:
    """``h`` ``[B, S, width]`` at ``index`` ``[B, K]``: ``[B, K, width]``."""
    return h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))
