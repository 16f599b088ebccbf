"""The last look before a run takes its output directory: do the parts fit together, and does the data hold any block?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from components.data import Rows, StreamedText, collate, first_rows
from components.losses import learned_tokens
from components.models import Policy
from components.rollouts import NoRollouts, StridedAnchors
from components.training.messages import say
from components.training.parts import Measuring, Parts
from components.types import Batch, Loss, Rewards


def check_parts(
    *, policy: Policy, parts: Parts, loss: Loss, dataset: Rows | StreamedText, held_out: Rows | None
) -> None:
    """Refuse what would only fail, or silently do nothing, once training runs; say what is worth knowing.

    Args:
        policy: for its vocabulary and its reach.
        parts: of the step; the advantage is tried on a reward of zeros.
        loss: for what it needs.
        dataset: its first rows are looked at.
        held_out: the dataset of validation, if there is one; likewise.

    Raises:
        ValueError: rows or rollouts longer than the policy can read, stop tokens that it does not have, greedy rollouts, a KL
            term without reference or a reference without it, too few samples for the advantage, a verifier without whole
            completions or without the records that it needs, no block that counts, or no token to learn from.
    """
    if loss.uses_reference != (parts.reference is not None):
        raise ValueError(
            "loss.kl_coef and reference are only of use together; give both (components.models.ReferencePolicy), or neither"
        )
    batch = collate(first_rows(dataset, 512))
    if loss.uses_target and not learned_tokens(batch).any():
        raise ValueError("no token of the first rows of dataset is learned from; its rows hold prompts alone")
    count = f"{len(dataset)} rows" if not isinstance(dataset, StreamedText) else "a stream of rows"
    say(f"{count} of {batch.tokens.shape[1]} tokens")
    _check_measuring(parts.training, "", batch, policy)
    if not isinstance(parts.training.generator, NoRollouts):
        _check_learning(parts.training.generator, parts, batch)
    if held_out is not None:
        _check_measuring(parts.validation, "validation.", collate(first_rows(held_out, 512)), policy)


def _check_measuring(measuring: Measuring, place: str, batch: Batch, policy: Policy) -> None:
    """What training and validation have in common: rows that the policy reads, blocks that fit in, and what the reward needs.
    ``place`` is what the keys in messages begin with."""
    rows, L = batch.tokens.shape
    generator: Any = measuring.generator
    with _at(place, "dataset"):
        policy.check_length(L)
    if isinstance(generator, NoRollouts):
        return
    _check_stop_tokens(measuring, f"{place}generator", policy)
    _check_completions(measuring, f"{place}generator")
    if getattr(measuring.reward, "uses_records", False) and batch.records is None:
        raise ValueError(
            f"{place}reward needs the records that rows were made from, and {place}dataset gives none; use "
            "components.data.PromptCompletion with one record a row"
        )
    with _at(place, "generator"):
        anchors = generator.anchors(batch, generator.rollout_len)
        policy.check_length(int(anchors.positions.max()) + generator.rollout_len)
    if not anchors.mask.any():
        raise ValueError(
            f"no block counts in the first {rows} rows of {place}dataset: every document (or target) is shorter than the "
            f"prefix and rollout together, or has no prompt; lower {place}generator.anchors.context_len or "
            f"{place}generator.rollout_len, or use other text"
        )


@contextmanager
def _at(place: str, key: str) -> Iterator[None]:
    """Errors with the place of validation's key before them; those of training name their keys."""
    try:
        yield
    except ValueError as error:
        if not place:
            raise
        raise ValueError(f"{place}{key}: {error}") from error


def _check_stop_tokens(measuring: Measuring, path: str, policy: Policy) -> None:
    """A token that the model does not have would end no rollout."""
    vocabulary = policy.decoder.tok_embeddings.num_embeddings
    for token in getattr(measuring.generator, "stop_tokens", ()):
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"{path}.stop_tokens names the id {token}, and the model's are from 0 to {vocabulary - 1}; correct it, or "
                "give the token's text"
            )


def _check_completions(measuring: Measuring, name: str) -> None:
    """A reward that reads records judges whole answers; pieces of them would all be wrong."""
    generator: Any = measuring.generator
    if not getattr(measuring.reward, "uses_records", False):
        return
    if isinstance(generator.anchors, StridedAnchors):
        raise ValueError(
            f"{name} has StridedAnchors as anchors, and reward judges whole completions, of which these are pieces; use "
            "components.rollouts.CompletionAnchor"
        )
    if not getattr(generator, "stop_tokens", ()):
        raise ValueError(
            f"{name} has no stop_tokens, and reward judges whole completions: none would ever end; name at least the EOS token"
        )


def _check_learning(generator: Any, parts: Parts, batch: Batch) -> None:
    """Whether rollouts give a gradient; what is worth knowing of the blocks."""
    n = generator.num_samples
    if generator.temperature <= 0:
        raise ValueError(
            "generator.temperature is 0: greedy rollouts are all alike and give no gradient; set it above 0"
        )
    nothing = torch.zeros(1, n, 1)
    parts.advantage(Rewards(pointwise=nothing, pairwise=nothing, mask=torch.ones(1, 1, dtype=torch.bool)))
    if n == 2:
        say("2 samples per anchor: with RLOO the diversity reward has no baseline (0), only alignment has one")
    L = batch.tokens.shape[1]
    anchors = generator.anchors(batch, generator.rollout_len)
    say(
        f"{anchors.mask.shape[1]} anchors a row of which "
        f"{anchors.mask.float().mean():.0%} count, {n} samples of {generator.rollout_len} tokens at each"
    )
    ends = (anchors.positions + generator.rollout_len - 1).clamp(max=L - 1)
    first, last = batch.doc_ids.gather(1, anchors.positions - 1), batch.doc_ids.gather(1, ends)
    straddles = (first != last) & (last >= 0)  # a whole completion reaches into the padding
    if (straddles & anchors.mask).any():
        say(
            f"{straddles[anchors.mask].float().mean():.0%} of the blocks that count continue one document and are compared "
            "with another; leave them out with generator.anchors.document_mask: true"
        )
