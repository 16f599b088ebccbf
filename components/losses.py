"""What the optimizer descends on: REINFORCE on the rollouts, plus cross-entropy on the ground truth (paper, algorithm 1), plus,
beyond the paper, a KL divergence that holds the policy near a reference.

All terms are means over tokens. When a step is split into micro-batches, or over ranks, the means must still be over the
whole step: :class:`TokenCounts` carries its totals into every part.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from components.schedules import Schedule, value_at
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


KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """Schulman's estimators of ``KL(pi || ref)`` per token ("Approximating KL divergence", 2020), with gradients for a loss.

    With ``r = log ref - log pi`` of tokens that ``pi`` drew, ``E[k1] = E[k3] = KL``, and ``E[k2]`` is KL to second order.
    Their gradients differ more, since a sampled value does not show that the policy also decides what is drawn. On
    average they are those of

    - ``k1 = -r``: ``KL(pi || ref)`` of whole rollouts. Differentiated as it stands, ``-r`` has a gradient of mean 0, so
      here each token's score is weighted by the ``-r`` of its own and all later tokens, as if k1 were taken off the reward.
    - ``k2 = r^2 / 2``: each token's ``KL(pi || ref)``, the tokens before it taken as given. The least noisy.
    - ``k3 = e^r - 1 - r``: each token's ``KL(ref || pi)``, the other direction, the tokens before it taken as given; what
      GRPO adds to its loss. Never negative, and heavy-tailed where ``pi`` is far below ``ref``.

    Args:
        log_ratio: ``r``, ``[..., G]``, differentiable; 0 for tokens that do not count.
        estimator: which.

    Returns:
        ``[..., G]``.
    """
    if estimator == "k1":
        cost = -log_ratio.detach()
        to_come = cost.flip(-1).cumsum(-1).flip(-1)
        return cost - to_come * (log_ratio - log_ratio.detach())
    if estimator == "k2":
        return log_ratio.square() / 2
    return log_ratio.expm1() - log_ratio


class PolicyGradientLoss:
    """``rl_coef * policy gradient + ce_coef * next-token cross-entropy + kl_coef * KL from the reference``.

    The policy-gradient term is ``-mean(A * exp(logp - stop_gradient(logp)))`` over rollout tokens: on-policy the ratio is 1,
    its gradient is REINFORCE's, and its value, minus the mean advantage, is what the authors' code reports. Every token of
    a rollout carries the rollout's advantage. The KL term is the mean of :func:`kl_estimate` over the same tokens, of both
    distributions at the sampling temperature.

    Args:
        rl_coef: weight of the policy gradient; 0 leaves supervised fine-tuning.
        ce_coef: weight of the cross-entropy (paper's gamma: 0, 0.03 or 0.1).
        kl_coef: weight of the KL term (paper: 0); above 0 the recipe needs a ``reference``.
        kl_estimator: see :func:`kl_estimate`.

    Each coefficient is a number, or a schedule of ``components.schedules``.

    Raises:
        ValueError: a negative coefficient, ``rl_coef`` and ``ce_coef`` both 0, or an unknown estimator.
    """

    def __init__(
        self,
        *,
        rl_coef: float | Schedule = 1.0,
        ce_coef: float | Schedule = 0.0,
        kl_coef: float | Schedule = 0.0,
        kl_estimator: KLEstimator = "k2",
    ) -> None:
        negative = any(not isinstance(coef, Schedule) and coef < 0 for coef in (rl_coef, ce_coef, kl_coef))
        if negative or not (_ever(rl_coef) or _ever(ce_coef)):
            raise ValueError(
                f"rl_coef is {rl_coef}, ce_coef {ce_coef}, kl_coef {kl_coef}; none may be negative, and of the first two "
                "one must be above 0"
            )
        if kl_estimator not in get_args(KLEstimator):
            raise ValueError(f"kl_estimator is {kl_estimator!r}; choose one of {', '.join(get_args(KLEstimator))}")
        self.rl_coef = rl_coef
        self.ce_coef = ce_coef
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator

    @property
    def uses_rollouts(self) -> bool:
        """Whether rollouts are needed, at some step; without them this is supervised fine-tuning."""
        return _ever(self.rl_coef) or _ever(self.kl_coef)

    @property
    def uses_target(self) -> bool:
        """Whether ``logprobs.target`` is needed, at some step."""
        return _ever(self.ce_coef)

    @property
    def uses_reference(self) -> bool:
        """Whether ``reference`` is needed, at some step."""
        return _ever(self.kl_coef)

    def __call__(
        self,
        logprobs: Logprobs,
        advantages: Tensor,
        batch: Batch,
        rollouts: Rollouts,
        counts: TokenCounts | None = None,
        *,
        reference: Tensor | None = None,
        step: int = 0,
    ) -> LossOutput:
        """The loss of one micro-batch.

        Args:
            logprobs: of the rollouts at their sampling temperature, and of the ground truth if ``uses_target``.
            advantages: ``[B, n, K]``.
            batch: for its ``target_mask``.
            rollouts: for their ``mask``.
            counts: of the whole step; by default this micro-batch is the whole step. Losses of micro-batches add up.
            reference: ``[B, n, K, G]`` float32, the reference's log-probs of the rollouts at their sampling temperature,
                if ``uses_reference``.
            step: optimizer steps done, for coefficients that follow a schedule.

        Raises:
            ValueError: what ``uses_target`` or ``uses_reference`` asks for is missing, or a schedule that turns negative.
        """
        counts = counts or TokenCounts.of(batch, rollouts)
        # Masked here, not in the sums alone: an infinite value would still make its gradient NaN.
        rollout = torch.where(rollouts.mask, logprobs.rollout, 0.0)
        policy = -_masked_sum(advantages[..., None] * (rollout - rollout.detach()).exp(), rollouts.mask)
        policy = policy / counts.rollout.clamp(min=1)
        loss, metrics = value_at(self.rl_coef, step) * policy, {}
        if self.uses_rollouts:
            metrics["policy_loss"] = float(policy.detach())
        if logprobs.target is not None:
            cross_entropy = -_masked_sum(logprobs.target, learned_tokens(batch)) / counts.target.clamp(min=1)
            metrics["cross_entropy"] = float(cross_entropy.detach())
            if self.uses_target:
                loss = loss + value_at(self.ce_coef, step) * cross_entropy
        elif self.uses_target:
            raise ValueError(
                "ce_coef is above 0 but no ground-truth log-probs were given; call the policy with_target=True"
            )
        if self.uses_reference:
            if reference is None:
                raise ValueError("kl_coef is above 0 but no reference log-probs were given; pass reference=")
            log_ratio = torch.where(rollouts.mask, reference, 0.0) - rollout
            kl = kl_estimate(log_ratio, self.kl_estimator).sum(dtype=torch.float64) / counts.rollout.clamp(min=1)
            loss, metrics["kl"] = loss + value_at(self.kl_coef, step) * kl, float(kl.detach())
        return LossOutput(loss=loss.float(), metrics={**metrics, "loss": float(loss.detach())})


def _ever(coef: float | Schedule) -> bool:
    """Whether a coefficient may be above 0 at some step."""
    return isinstance(coef, Schedule) or coef > 0


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum in float64 over ``mask``; what is masked out may be anything, even not finite."""
    return torch.where(mask, values, 0.0).sum(dtype=torch.float64)
