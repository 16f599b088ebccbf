"""What the optimizer descends on: REINFORCE on the rollouts, plus cross-entropy on the ground truth (paper, algorithm 1).

Both terms are means over tokens. When a step is split into micro-batches, or over ranks, the means must still be over the
whole step: :class:`TokenCounts` carries its totals into every part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from components.types import Batch, Logprobs, LossOutput, Rollouts


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """How many tokens each term of the loss averages over: scalars, float64."""

    rollout: Tensor
    target: Tensor

    @staticmethod
    def of(batch: Batch, rollouts: Rollouts) -> "TokenCounts":
        """The counts of one micro-batch."""
        return TokenCounts(rollout=rollouts.mask.sum().double(), target=learned_tokens(batch).sum().double())

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(rollout=self.rollout + other.rollout, target=self.target + other.target)


def learned_tokens(batch: Batch) -> Tensor:
    """``[B, L-1]`` bool over ``logprobs.target``: tokens that are learned from and have a predecessor in their document."""
    return batch.target_mask[:, 1:] & (batch.doc_ids[:, 1:] == batch.doc_ids[:, :-1])


class PolicyGradientLoss:
    """``rl_coef * policy gradient + ce_coef * next-token cross-entropy``.

    The policy-gradient term is ``-mean(A * exp(logp - stop_gradient(logp)))`` over rollout tokens: on-policy the ratio is 1,
    its gradient is REINFORCE's, and its value, minus the mean advantage, is what the authors' code reports. Every token of
    a rollout carries the rollout's advantage.

    Args:
        rl_coef: weight of the policy gradient; 0 leaves supervised fine-tuning.
        ce_coef: weight of the cross-entropy (paper's gamma: 0, 0.03 or 0.1).

    Raises:
        ValueError: a negative coefficient, or both 0.
    """

    def __init__(self, *, rl_coef: float = 1.0, ce_coef: float = 0.0) -> None:
        if rl_coef < 0 or ce_coef < 0 or rl_coef == ce_coef == 0:
            raise ValueError(
                f"rl_coef is {rl_coef} and ce_coef {ce_coef}; neither may be negative, one must be above 0"
            )
        self.rl_coef = rl_coef
        self.ce_coef = ce_coef

    @property
    def uses_target(self) -> bool:
        """Whether ``logprobs.target`` is needed."""
        return self.ce_coef > 0

    def __call__(
        self,
        logprobs: Logprobs,
        advantages: Tensor,
        batch: Batch,
        rollouts: Rollouts,
        counts: TokenCounts | None = None,
    ) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            logprobs: of the rollouts at their sampling temperature, and of the ground truth if ``uses_target``.
            advantages: ``[B, n, K]``.
            batch: for its ``target_mask``.
            rollouts: for their ``mask``.
            counts: of the whole step; by default this micro-batch is the whole step. Losses of micro-batches add up.
        """
        counts = counts or TokenCounts.of(batch, rollouts)
        ratio = (logprobs.rollout - logprobs.rollout.detach()).exp()
        policy = -_masked_sum(advantages[..., None] * ratio, rollouts.mask) / counts.rollout.clamp(min=1)
        loss, metrics = self.rl_coef * policy, {"policy_loss": float(policy.detach())}
        if logprobs.target is not None:
            cross_entropy = -_masked_sum(logprobs.target, learned_tokens(batch)) / counts.target.clamp(min=1)
            metrics["cross_entropy"] = float(cross_entropy.detach())
            if self.uses_target:
                loss = loss + self.ce_coef * cross_entropy
        elif self.uses_target:
            raise ValueError(
                "ce_coef is above 0 but no ground-truth log-probs were given; call the policy with_target=True"
            )
        return LossOutput(loss=loss.float(), metrics={**metrics, "loss": float(loss.detach())})


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum in float64 over ``mask``; what is masked out may be anything, even not finite."""
    return torch.where(mask, values, 0.0).sum(dtype=torch.float64)
