"""Verifiers score whole completions against the row they answer; :class:`VerifierReward` makes a reward of one.

A verifier is any callable ``verifier(completions, records) -> scores in [0, 1]``. Those here compare text with the reference of
the record; the one that runs code stands in ``unit_tests.py``.
"""

import json
import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from sacrebleu.metrics import BLEU, CHRF

from components.rewards.energy import block_means
from components.types import Batch, Features, Rewards, Rollouts


class Verifier(Protocol):
    """Scores completions: 1 is right, 0 is wrong, and between them is partly so."""

    def __call__(self, completions: list[str], records: list[dict[str, Any]]) -> list[float]: ...


def verified(verifier: Verifier, completions: list[str], records: list[dict[str, Any]]) -> list[float]:
    """The scores that ``verifier`` gives, once they are what they must be.

    Raises:
        ValueError: not one score per completion, or one that is no number from 0 to 1.
    """
    scores = verifier(completions, records)
    name = getattr(verifier, "__name__", type(verifier).__name__)
    if len(scores) != len(completions):
        raise ValueError(
            f"verifier {name} gave {len(scores)} scores for {len(completions)} completions; return one for each"
        )
    for score, record in zip(scores, records, strict=True):
        if not (isinstance(score, numbers.Real) and 0 <= score <= 1):
            raise ValueError(
                f"verifier {name} gave {score!r} as the score of record {record.get('id')!r}; return numbers from 0 to 1"
            )
    return [float(score) for score in scores]


class Decoder(Protocol):
    """What is asked of a tokenizer here: text without special tokens."""

    def decode(self, ids: Sequence[int], /) -> str: ...


class VerifierReward:
    """The score of a verifier as the reward of a rollout (RLVR): pointwise, with no pairwise part.

    Rollouts are whole completions: ``generator.anchors`` a ``CompletionAnchor``, with stop tokens.

    Args:
        verifier: scores the text.
        tokenizer: turns rollouts into text; the stop token that ended one is left out.
        stop_tokens: ids of the tokens that end rollouts; the recipe gives those of the generator. Without them, one that is
            the last of a rollout's ``G`` tokens is taken for text, unless it is a special token.
    """

    uses_features = False
    uses_records = True

    def __init__(self, *, verifier: Verifier, tokenizer: Decoder, stop_tokens: Sequence[int] = ()) -> None:
        self.verifier = verifier
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset(stop_tokens)

    @torch.no_grad()
    def __call__(self, batch: Batch, rollouts: Rollouts, features: Features) -> Rewards:
        """Rewards ``[B, n, K]`` of every rollout; zero for blocks that do not count, which are not scored.

        Metrics: ``reward``, ``solved`` (share of scores that are 1), ``empty_completions`` (share) and
        ``completion_length`` (tokens, the stop token included).

        Raises:
            ValueError: rows without records, or scores that :func:`verified` refuses.
        """
        if batch.records is None:
            raise ValueError(
                "the rows of dataset carry no records to verify completions with; use components.data.PromptCompletion"
            )
        lengths = rollouts.mask.sum(dim=-1)  # [B, n, K]
        counted = (lengths > 0).nonzero().tolist()
        texts = [self._text(rollouts.tokens[b, j, k].tolist(), int(lengths[b, j, k])) for b, j, k in counted]
        scores = torch.zeros(lengths.shape, dtype=torch.float32)
        empty = torch.zeros(lengths.shape)
        if counted:
            index = tuple(torch.tensor(counted).unbind(dim=1))
            scores[index] = torch.tensor(verified(self.verifier, texts, [batch.records[b] for b, _, _ in counted]))
            empty[index] = torch.tensor([float(not text.strip()) for text in texts])
        scores = scores.to(lengths.device)
        mask = (lengths > 0).any(dim=1)
        metrics = {
            "reward": scores,
            "solved": scores == 1,
            "empty_completions": empty.to(lengths.device),
            "completion_length": lengths,
        }
        return Rewards(
            pointwise=scores,
            pairwise=torch.zeros_like(scores),
            mask=mask,
            metrics=block_means(mask, **{name: value.transpose(1, 2) for name, value in metrics.items()}),
        )

    def _text(self, tokens: list[int], length: int) -> str:
        stopped = length < len(tokens) or tokens[-1] in self.stop_tokens
        return self.tokenizer.decode(tokens[: length - stopped])


class ExactMatch:
    """1 if the answer is the reference, else 0.

    Args:
        after: the answer is what follows the last occurrence of this text (none: the answer is wrong), as in ``"####"``.
        last_line: the answer is its last line that is not blank.
        strip: leave out white space around both.
        as_json: compare as JSON values (:func:`same_value`), not as text.
        reference_column: of the record.
    """

    def __init__(
        self,
        *,
        after: str | None = None,
        last_line: bool = False,
        strip: bool = True,
        as_json: bool = False,
        reference_column: str = "completion",
    ) -> None:
        self.after = after
        self.last_line = last_line
        self.strip = strip
        self.as_json = as_json
        self.reference_column = reference_column

    def __call__(self, completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """Scores of ``completions``."""
        references = _references(records, self.reference_column)
        return [float(self._same(text, reference)) for text, reference in zip(completions, references, strict=True)]

    def _same(self, completion: str, reference: str) -> bool:
        answer = self._answer(completion)
        if answer is None:
            return False
        # A reference may be a whole solution, which ends in its answer as the completion does.
        wanted = self._answer(reference)
        wanted = reference if wanted is None else wanted
        if self.as_json:
            return same_json(answer, wanted)
        return answer.strip() == wanted.strip() if self.strip else answer == wanted

    def _answer(self, text: str) -> str | None:
        if self.after is not None:
            _, found, text = text.rpartition(self.after)
            if not found:
                return None
        if self.last_line:
            return next((line for line in reversed(text.splitlines()) if line.strip()), "")
        return text


class SentenceChrF:
    """chrF (sacrebleu's defaults) of one sentence, over 100.

    Args:
        word_order: 2 for chrF++.
        reference_column: of the record.
    """

    def __init__(self, *, word_order: int = 0, reference_column: str = "completion") -> None:
        self.metric = CHRF(word_order=word_order)
        self.reference_column = reference_column

    def __call__(self, completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """Scores of ``completions``."""
        return _sentence_scores(self.metric, completions, _references(records, self.reference_column))


class SentenceBLEU:
    """BLEU of one sentence, over 100: n-gram orders that the sentence is too short for are left out.

    Args:
        tokenize: sacrebleu's tokenizer, such as ``13a``, ``zh``, ``ja-mecab``, ``char``.
        reference_column: of the record.
    """

    def __init__(self, *, tokenize: str = "13a", reference_column: str = "completion") -> None:
        self.metric = BLEU(tokenize=tokenize, effective_order=True)
        self.reference_column = reference_column

    def __call__(self, completions: list[str], records: list[dict[str, Any]]) -> list[float]:
        """Scores of ``completions``."""
        return _sentence_scores(self.metric, completions, _references(records, self.reference_column))


def same_json(one: str, other: str, tolerance: float = 0.0) -> bool:
    """Whether two texts are JSON of the same value (:func:`same_value`); what is no JSON is the same as nothing."""
    try:
        return same_value(json.loads(one), json.loads(other), tolerance)
    except (ValueError, RecursionError):
        return False


def same_value(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether two JSON values are of the same types and equal: 1, 1.0 and true are three values, NaN equals itself.

    Floats may differ by ``tolerance``, relative to the larger, or to 1 if both are smaller.
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(one, list):
        return len(one) == len(other) and all(same_value(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key], tolerance) for key in one)
    return one == other


def _references(records: list[dict[str, Any]], column: str) -> list[str]:
    for record in records:
        if not isinstance(record.get(column), str):
            raise ValueError(
                f"record {record.get('id')!r} has no text {column!r} to compare with; set reference_column to one of its "
                f"columns ({', '.join(record)})"
            )
    return [record[column] for record in records]


def _sentence_scores(metric: BLEU | CHRF, completions: list[str], references: list[str]) -> list[float]:
    pairs = zip(completions, references, strict=True)
    return [min(1.0, metric.sentence_score(text, [reference]).score / 100) for text, reference in pairs]
