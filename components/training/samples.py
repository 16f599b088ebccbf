"""Rollouts kept for people to read: one JSON file per kept step, with the text, its anchors and what was sampled there.

Tokens are kept as the text they stand for, so that a page needs no tokenizer. Nothing is trained from these files; they are
what ``components.report`` shows.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

from torch import Tensor

from components.types import Batch, Rewards, Rollouts

# Bytes of the longest UTF-8 character: with byte-level tokens, how many of them may share one.
_LONGEST_CHARACTER = 4


class Decoder(Protocol):
    """The half of a tokenizer that is needed here; ``HFTokenizer`` and torchtune's tokenizers have it."""

    def decode(self, ids: list[int]) -> str: ...


class KeptSample(TypedDict):
    """One rollout. ``tokens``, ``logprobs`` and ``mask`` (1 where a token counts) are of the same length ``G``; ``copy_of``
    is the number of the earliest sample at the anchor that is the same, or None. The reward is ``pointwise + pairwise``."""

    tokens: list[str]
    logprobs: list[float | None]
    mask: list[int]
    pointwise: float | None
    pairwise: float | None
    advantage: float | None
    copy_of: int | None


class KeptBlock(TypedDict):
    """One anchor: the samples continue ``tokens[:anchor]`` of the text, whose own continuation is ``truth``. ``counts`` is
    False where the block is not trained on."""

    anchor: int
    counts: bool
    truth: list[str]
    samples: list[KeptSample]


class KeptText(TypedDict):
    """One row of a batch without its padding; ``documents`` says of every token which document it belongs to."""

    tokens: list[str]
    documents: list[int]
    blocks: list[KeptBlock]


def save_rollouts(
    output_dir: str | Path,
    step: int,
    *,
    tokenizer: Decoder,
    batch: Batch,
    rollouts: Rollouts,
    rewards: Rewards,
    advantages: Tensor,
    rows: int = 1,
) -> Path:
    """Write the first ``rows`` rows of a batch to ``output_dir/rollouts/step_N.json``, whole or not at all.

    Numbers are kept to four decimals; one that JSON cannot hold becomes null. For one rank to call.

    Args:
        output_dir: of the run.
        step: the optimizer step that these rollouts belong to.
        tokenizer: made the batch.
        batch: ``B`` rows of text.
        rollouts: of the batch.
        rewards: of the rollouts.
        advantages: ``[B, n, K]``, of the rewards.
        rows: how many rows to keep; all if there are fewer.
    """
    texts = [_text(row, tokenizer, batch, rollouts, rewards, advantages) for row in range(min(rows, len(batch.tokens)))]
    path = _path(output_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(texts, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    os.replace(partial, path)
    return path


def load_rollouts(run_dir: str | Path) -> dict[int, list[KeptText]]:
    """All kept rollouts of a run, by step, in order."""
    files = sorted(Path(run_dir, "rollouts").glob("step_*.json"))
    return {int(file.stem.removeprefix("step_")): json.loads(file.read_text(encoding="utf-8")) for file in files}


def forget_rollouts(run_dir: str | Path, after: int) -> None:
    """Remove rollouts of steps after ``after``, which a resumed run makes again."""
    for file in Path(run_dir, "rollouts").glob("step_*.json"):
        if int(file.stem.removeprefix("step_")) > after:
            file.unlink()


def token_texts(tokenizer: Decoder, ids: Sequence[int], *, context: Sequence[int] = ()) -> list[str]:
    """The text of each token of ``ids``, which follow ``context``; joined they are the text of all.

    A token is decoded behind those before it, since some tokenizers drop a leading space. Of tokens that are parts of one
    character, the last has the character and the others nothing, as have special tokens; bytes that are no character are
    shown as U+FFFD.
    """
    texts, known = [], [*context[-_LONGEST_CHARACTER:], *ids]
    done = len(known) - len(ids)  # tokens whose text is out
    start = 0  # of the window that is decoded
    for end in range(done + 1, len(known) + 1):
        text = tokenizer.decode(known[start:end])
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and end - done < _LONGEST_CHARACTER
        if unfinished and end < len(known):
            texts.append("")
            continue
        before = tokenizer.decode(known[start:done])
        # A character of which `before` has only the first bytes is no prefix of `text`.
        shared = os.path.commonprefix([before, text])  # of any strings  # noqa: RUF071
        texts.append(text[len(shared) :])
        start, done = done, end
    return texts


def _text(
    row: int, tokenizer: Decoder, batch: Batch, rollouts: Rollouts, rewards: Rewards, advantages: Tensor
) -> KeptText:
    documents = batch.doc_ids[row].tolist()
    length = max((place for place, document in enumerate(documents, start=1) if document >= 0), default=0)
    ids = batch.tokens[row].tolist()[:length]
    tokens = token_texts(tokenizer, ids)
    G = rollouts.tokens.shape[-1]
    blocks: list[KeptBlock] = []
    for k, anchor in enumerate(rollouts.anchors[row].tolist()):
        drawn, mask = rollouts.tokens[row, :, k].tolist(), rollouts.mask[row, :, k].int().tolist()
        # What stands behind a stop token is no difference between two samples.
        compared = [
            [token if kept else -1 for token, kept in zip(*sample, strict=True)]
            for sample in zip(drawn, mask, strict=True)
        ]
        blocks.append(
            KeptBlock(
                anchor=anchor,
                counts=bool(rewards.mask[row, k]),
                truth=tokens[anchor : anchor + G],
                samples=[
                    KeptSample(
                        tokens=token_texts(tokenizer, drawn[j], context=ids[:anchor]),
                        logprobs=_numbers(rollouts.logprobs[row, j, k]),
                        mask=mask[j],
                        pointwise=_number(rewards.pointwise[row, j, k]),
                        pairwise=_number(rewards.pairwise[row, j, k]),
                        advantage=_number(advantages[row, j, k]),
                        copy_of=first if (first := compared.index(compared[j])) < j else None,
                    )
                    for j in range(len(drawn))
                ],
            )
        )
    return KeptText(tokens=tokens, documents=documents[:length], blocks=blocks)


def _numbers(values: Tensor) -> list[float | None]:
    return [round(value, 4) if math.isfinite(value) else None for value in values.tolist()]


def _number(value: Tensor) -> float | None:
    return _numbers(value[None])[0]


def _path(output_dir: str | Path, step: int) -> Path:
    return Path(output_dir, "rollouts", f"step_{step:06d}.json")
