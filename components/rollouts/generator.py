"""Strided block-parallel sampling: several short continuations at many points of every text at once (paper, section 3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from components.blocks import Anchors, KVCache, PackedLayout
from components.data import Tokenizer
from components.models import Policy
from components.rollouts.sampling import Sampler
from components.types import Batch, Rollouts


class BlockParallelGenerator:
    """Draws ``num_samples`` rollouts of ``rollout_len`` tokens at every anchor of every row.

    The prompt is read once for all samples; each further token costs one forward of ``n * K`` tokens against a cache. The
    same generator draws whole completions (:class:`CompletionAnchor` with stop tokens) and, greedy, serves evaluation.

    Args:
        anchors: where blocks start.
        rollout_len: ``G``, tokens of a rollout (paper: 8 for code, 4 for translation).
        num_samples: ``n``, rollouts per anchor (paper: 4).
        temperature: of sampling, and of the log-probs that are trained on (paper: 0.6). 0 is greedy, for evaluation.
        top_p: nucleus sampling; below 1, log-probs are still those of the whole distribution.
        top_k: keep this many tokens, 0 for all.
        stop_tokens: a rollout ends with the first of these, given as ids or as text; what follows is masked.
        tokenizer: only for ``stop_tokens`` given as text; the recipe gives it.

    Raises:
        ValueError: lengths or counts below 1, a stop token that is no single token, or what :class:`Sampler` refuses.
    """

    def __init__(
        self,
        *,
        anchors: Anchors,
        rollout_len: int,
        num_samples: int,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        stop_tokens: Sequence[int | str] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if rollout_len < 1:
            raise ValueError(f"rollout_len is {rollout_len}; a rollout has at least 1 token")
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; draw at least 1 rollout per anchor")
        self.anchors = anchors
        self.rollout_len = rollout_len
        self.num_samples = num_samples
        self.temperature = temperature
        self.stop_tokens = [_token_id(token, tokenizer) for token in stop_tokens or []]
        self._sampler = Sampler(temperature=temperature, top_p=top_p, top_k=top_k)

    def __call__(self, policy: Policy, batch: Batch, rng: torch.Generator) -> Rollouts:
        """Rollouts of ``batch``.

        Args:
            policy: what is sampled.
            batch: ``[B, L]``.
            rng: source of one uniform number per token, in the same state on every rank. Rows consume it in the order of
                the data stream, whichever rank and micro-batch they are in, and in a row the samples do: what is drawn
                does not depend on how a step is split, and all ranks leave ``rng`` in the same state again.

        Raises:
            ValueError: rows too short for a block, or longer than the model can read.
            FloatingPointError: logits that are not finite.
        """
        anchors = self.anchors(batch, self.rollout_len)
        positions, n, G = anchors.positions, self.num_samples, self.rollout_len
        policy.check_length(max(batch.tokens.shape[1], int(positions.max()) + G))
        B, K = positions.shape
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        numbers = uniforms((B, n, K, G), rng, rank=rank, world_size=world_size).to(batch.tokens.device)
        layout = PackedLayout(doc_ids=batch.doc_ids, anchors=positions, num_samples=n, block_len=G)
        cache = KVCache(kv_heads=policy.kv_heads, block_len=G - 1)

        with _gathered(policy):
            drawn = [policy.prefill(batch, layout, cache, numbers[..., 0], self._sampler)]
            masks = [anchors.mask[:, None].expand(B, n, K)]
            open_blocks = self._still_open(masks[0], drawn[0].tokens)
            for step in range(1, G):
                if self.stop_tokens and not bool(open_blocks.any()):
                    break
                masks.append(open_blocks)
                drawn.append(
                    policy.decode(drawn[-1].tokens, step - 1, layout, cache, numbers[..., step], self._sampler)
                )
                open_blocks = self._still_open(open_blocks, drawn[-1].tokens)

        missing = G - len(drawn)
        tokens = torch.stack([step.tokens for step in drawn] + [drawn[-1].tokens] * missing, dim=-1)
        logprobs = torch.stack([step.logprobs for step in drawn] + [drawn[-1].logprobs] * missing, dim=-1)
        mask = torch.stack(masks + [torch.zeros_like(masks[0])] * missing, dim=-1)
        if not bool(logprobs.isfinite().all()):
            raise FloatingPointError(
                "the policy's logits are not finite: its weights have diverged; go on from an earlier checkpoint with a lower "
                "optimizer.lr"
            )
        return Rollouts(tokens=tokens, mask=mask, anchors=positions, logprobs=logprobs)

    def _still_open(self, open_blocks: Tensor, tokens: Tensor) -> Tensor:
        """Which blocks go on after ``tokens``, ``[B, n, K]`` bool."""
        if not self.stop_tokens:
            return open_blocks
        return open_blocks & ~torch.isin(tokens, torch.tensor(self.stop_tokens, device=tokens.device))


def _token_id(token: int | str, tokenizer: Tokenizer | None) -> int:
    if isinstance(token, int):
        return token
    if tokenizer is None:
        raise ValueError(f"stop_tokens names {token!r}, and there is no tokenizer to look it up; give its id")
    ids = tokenizer.encode(token, add_bos=False, add_eos=False)
    if len(ids) != 1:
        raise ValueError(f"stop_tokens names {token!r}, which is {len(ids)} tokens; name texts that are one token")
    return ids[0]


def duplicate_share(rollouts: Rollouts) -> float:
    """Share of the rollouts that are copies of an earlier sample at their anchor, among those that count."""
    tokens = rollouts.tokens.where(rollouts.mask, -1).transpose(
        1, 2
    )  # [B, K, n, G]; what follows a stop is no difference
    same = (tokens[:, :, :, None] == tokens[:, :, None]).all(dim=-1)  # [B, K, n, n]
    copies = same.tril(diagonal=-1).any(dim=-1)
    counted = rollouts.mask.any(dim=-1).transpose(1, 2)
    return float((copies & counted).sum() / counted.sum().clamp(min=1))


def uniforms(shape: tuple[int, ...], rng: torch.Generator, *, rank: int, world_size: int) -> Tensor:
    """Uniform numbers of ``shape`` ``[B, ...]`` for the rows of ``rank``, out of those for the rows of all ranks.

    The ranks take rows in turn (``components.data.batch_loader``): row ``i`` of rank ``r`` is row ``i * world_size + r`` of
    the data stream. With ``rng`` in the same state on all of them, a row gets the same numbers whichever rank has it.
    """
    B, *row = shape
    return torch.rand(B, world_size, *row, generator=rng, device=rng.device)[:, rank]


@contextmanager
def _gathered(policy: nn.Module) -> Iterator[None]:
    """Keep a sharded policy's weights whole from the first forward inside to the end.

    They are gathered once per rollout, not once per token. Decode steps then call no other rank, so that each may stop where
    its own blocks do.
    """
    sharded = any(isinstance(p, DTensor) and p.device_mesh.size(-1) > 1 for p in policy.parameters())
    if not (sharded and isinstance(policy, FSDPModule)):
        yield
        return
    policy.set_reshard_after_forward(False)
    try:
        yield
    finally:
        policy.set_reshard_after_forward(True)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
