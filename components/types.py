"""The values that flow through one step, and the parts that can be swapped between them.

``batch -> rollouts -> features -> rewards -> advantages -> log-probs -> loss``: each arrow is one call in
``recipes/ebft.py``, each value one of the frozen dataclasses below, and each part a Protocol that YAML names with
``_component_``. Nothing is computed here.

Axes: ``B`` sequences, ``L`` tokens of a sequence, ``n`` samples per anchor, ``K`` anchors (a *block* is what one sample
writes at one anchor), ``G`` tokens of a rollout, ``D`` width of a feature vector. "Paper" is arXiv 2603.12248.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Ground-truth sequences.

    Attributes:
        tokens: ``[B, L]`` long.
        doc_ids: ``[B, L]`` long; which document a token belongs to, -1 for padding. Documents are contiguous, and
            tokens of different documents never see each other. A row whose documents shall flow into one another has
            one id for all of them.
        target_mask: ``[B, L]`` bool; True where the token is learned from (never on padding).
        records: the ``B`` source rows, for rewards that need more than tokens (a verifier's tests, a reference text).
        groups: what each row belongs to (a file, a module, a page): rows of one group are not independent. None if rows do not
            say.
    """

    tokens: Tensor
    doc_ids: Tensor
    target_mask: Tensor
    records: list[dict[str, Any]] | None = None
    groups: list[str] | None = None

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with its tensors on ``device``."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            doc_ids=self.doc_ids.to(device),
            target_mask=self.target_mask.to(device),
        )

    def rows(self, here: slice) -> "Batch":
        """Some of its rows."""
        return Batch(
            tokens=self.tokens[here],
            doc_ids=self.doc_ids[here],
            target_mask=self.target_mask[here],
            records=None if self.records is None else self.records[here],
            groups=None if self.groups is None else self.groups[here],
        )


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The policy's own continuations of every anchored prefix.

    Attributes:
        tokens: ``[B, n, K, G]`` long.
        mask: ``[B, n, K, G]`` bool; False on blocks that do not count (see ``StridedAnchors``) and after a stop token.
        anchors: ``[B, K]`` long; block ``k`` continues ``batch.tokens[:, :anchors[:, k]]``, so that its first token
            stands where ``batch.tokens[:, anchors[:, k]]`` stands. At least 1.
        logprobs: ``[B, n, K, G]`` float32, of the drawn tokens at the sampling temperature (before top-k and top-p).
    """

    tokens: Tensor
    mask: Tensor
    anchors: Tensor
    logprobs: Tensor


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the feature network makes of the rollouts and of the ground truth behind the same prefixes.

    Attributes:
        rollout: ``[B, n, K, D]`` float32.
        target: ``[B, K, D]`` float32.
        mask: ``[B, K]`` bool; False where a block does not count.

    With ``combine: stack`` the layers stay apart: ``[B, n, K, layers, D]`` and ``[B, K, layers, D]``.
    """

    rollout: Tensor
    target: Tensor
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """A reward per sample, in two parts that need different baselines (paper eq. 94).

    Attributes:
        pointwise: ``[B, n, K]`` float32; depends on the sample alone.
        pairwise: ``[B, n, K]`` float32; a mean over pairs of the sample with the others at its anchor (zero for
            rewards that have no such term).
        mask: ``[B, K]`` bool; False where a block does not count. Rewards are zero there.
        metrics: what the reward wants logged.
    """

    pointwise: Tensor
    pairwise: Tensor
    mask: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """``pointwise + pairwise``, ``[B, n, K]`` float32."""
        return self.pointwise + self.pairwise


@dataclass(frozen=True, kw_only=True)
class Logprobs:
    """Differentiable log-probs of one packed forward.

    Attributes:
        rollout: ``[B, n, K, G]`` float32; of the rollout tokens at the temperature asked for.
        target: ``[B, L-1]`` float32; entry ``t`` is the log-prob of ``batch.tokens[:, t+1]`` at temperature 1. None
            unless asked for.
    """

    rollout: Tensor
    target: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A scalar to differentiate, and what to log of it."""

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """The language model that is trained (``components.models.Policy``)."""

    def __call__(
        self, batch: Batch, rollouts: Rollouts, *, temperature: float, with_target: bool = False
    ) -> Logprobs: ...


class Generator(Protocol):
    """Draws rollouts from the policy; ``temperature`` is also what they are scored at."""

    temperature: float

    def __call__(self, policy: Any, batch: Batch, rng: torch.Generator) -> Rollouts: ...


class BlockGenerator(Generator, Protocol):
    """A generator as YAML names it: it also says where its rollouts start, how long they may be and how many there are.

    With ``stop_tokens``, the ids of the tokens that end a rollout, it can be judged by rewards that read whole completions.
    """

    anchors: Any
    rollout_len: int
    num_samples: int


class FeatureExtractor(Protocol):
    """Embeds rollouts and ground truth."""

    def __call__(self, batch: Batch, rollouts: Rollouts) -> Features: ...


class Reward(Protocol):
    """Scores every sample of every block.

    A reward may say ``uses_features = False``: no features are then made for it, and those it is given are empty. One
    that says ``uses_records = True`` needs ``batch.records``, and whole completions: no strided anchors, and stop tokens.
    """

    def __call__(self, batch: Batch, rollouts: Rollouts, features: Features) -> Rewards: ...


class Advantage(Protocol):
    """Subtracts a baseline: ``[B, n, K]`` float32, zero where ``rewards.mask`` is False."""

    def __call__(self, rewards: Rewards) -> Tensor: ...


class Reference(Protocol):
    """What a KL term keeps the policy close to: log-probs ``[B, n, K, G]`` float32 of the rollouts under frozen weights."""

    def __call__(self, batch: Batch, rollouts: Rollouts, *, temperature: float) -> Tensor: ...


class Loss(Protocol):
    """What the optimizer descends on; ``counts`` are the whole step's, see ``components.losses.TokenCounts``.

    ``reference`` ``[B, n, K, G]`` float32 are log-probs of the rollouts under a frozen policy, at the temperature of
    ``logprobs.rollout``; given if the loss ``uses_reference``. ``step`` counts the optimizer steps done. A loss may say
    ``uses_rollouts = False``: none are then drawn for it.
    """

    uses_target: bool
    uses_reference: bool

    def __call__(
        self,
        logprobs: Logprobs,
        advantages: Tensor,
        batch: Batch,
        rollouts: Rollouts,
        counts: Any = None,
        *,
        reference: Tensor | None = None,
        step: int = 0,
    ) -> LossOutput: ...
