"""The loss by hand, its gradient, and that parts of a step add up to the step."""

import pytest
import torch

from components.losses import PolicyGradientLoss, TokenCounts, learned_tokens
from components.types import Batch, Logprobs, Rollouts


def batch_of(doc_ids, target_mask=None):
    doc_ids = torch.tensor(doc_ids)
    mask = doc_ids >= 0 if target_mask is None else torch.tensor(target_mask)
    return Batch(tokens=torch.zeros_like(doc_ids), doc_ids=doc_ids, target_mask=mask)


def rollouts_of(mask):
    mask = torch.tensor(mask)
    zeros = torch.zeros(mask.shape)
    return Rollouts(
        tokens=zeros.long(), mask=mask, anchors=torch.ones(mask.shape[0], mask.shape[2]).long(), logprobs=zeros
    )


def test_policy_gradient_by_hand():
    """One block, two samples of two tokens, advantages 1 and -3; the second sample stopped after one token. Three tokens
    count: the loss is -(1 + 1 - 3) / 3, its gradient -A / 3 on each of them and 0 on the masked one."""
    rollouts = rollouts_of([[[[True, True]], [[True, False]]]])
    logprobs = torch.tensor([[[[-1.0, -2.0]], [[-3.0, -4.0]]]], requires_grad=True)
    advantages = torch.tensor([[[1.0], [-3.0]]])
    out = PolicyGradientLoss()(Logprobs(rollout=logprobs), advantages, batch_of([[0, 0]]), rollouts)
    assert out.loss.item() == pytest.approx(1 / 3)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[[[-1 / 3, -1 / 3]], [[1.0, 0.0]]]]))


def test_cross_entropy_by_hand():
    """Five tokens in two documents (3 and 2): predictions inside a document are 0->1, 1->2 and 3->4."""
    batch = batch_of([[0, 0, 0, 1, 1]])
    assert learned_tokens(batch).tolist() == [[True, True, False, True]]
    target = torch.tensor([[-1.0, -2.0, -50.0, -6.0]], requires_grad=True)
    rollouts = rollouts_of([[[[True]], [[True]]]])
    logprobs = Logprobs(rollout=torch.zeros(1, 2, 1, 1), target=target)
    out = PolicyGradientLoss(rl_coef=0.0, ce_coef=0.5)(logprobs, torch.ones(1, 2, 1), batch, rollouts)
    assert out.loss.item() == pytest.approx(0.5 * 3)
    assert out.metrics["cross_entropy"] == pytest.approx(3)
    out.loss.backward()
    torch.testing.assert_close(target.grad, torch.tensor([[-1 / 6, -1 / 6, 0.0, -1 / 6]]))


def test_what_is_masked_may_be_anything():
    rollouts = rollouts_of([[[[True, False]]]])
    logprobs = torch.tensor([[[[-1.0, torch.nan]]]], requires_grad=True)
    out = PolicyGradientLoss()(Logprobs(rollout=logprobs), torch.ones(1, 1, 1), batch_of([[0, 0]]), rollouts)
    assert out.loss.item() == -1


def test_nothing_to_learn_from_is_a_loss_of_zero_not_a_mean_over_everything():
    rollouts = rollouts_of([[[[False, False]]]])
    batch = batch_of([[0, 0, 0]], [[False, False, False]])
    logprobs = Logprobs(
        rollout=torch.full((1, 1, 1, 2), -1.0, requires_grad=True), target=torch.full((1, 2), -1.0, requires_grad=True)
    )
    out = PolicyGradientLoss(ce_coef=1.0)(logprobs, torch.ones(1, 1, 1), batch, rollouts)
    out.loss.backward()
    assert out.loss.item() == 0
    assert not logprobs.rollout.grad.any()
    assert not logprobs.target.grad.any()


def test_parts_of_a_step_add_up_to_the_step():
    """Two rows that count unequally: their losses, given the counts of both, sum to the loss of the batch."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 3, 4, 5, generator=generator) < torch.tensor([0.9, 0.2]).view(2, 1, 1, 1)
    rollouts = rollouts_of(mask.tolist())
    batch = batch_of([[0] * 8, [0] * 3 + [-1] * 5])
    logprobs = Logprobs(
        rollout=torch.randn(2, 3, 4, 5, generator=generator), target=torch.randn(2, 7, generator=generator)
    )
    advantages = torch.randn(2, 3, 4, generator=generator)
    loss = PolicyGradientLoss(rl_coef=0.7, ce_coef=0.3)
    whole = loss(logprobs, advantages, batch, rollouts)

    def row(i):
        here = slice(i, i + 1)
        return (
            Logprobs(rollout=logprobs.rollout[here], target=logprobs.target[here]),
            advantages[here],
            Batch(tokens=batch.tokens[here], doc_ids=batch.doc_ids[here], target_mask=batch.target_mask[here]),
            rollouts_of(mask[here].tolist()),
        )

    counts = TokenCounts.of(row(0)[2], row(0)[3]) + TokenCounts.of(row(1)[2], row(1)[3])
    parts = [loss(*row(i), counts) for i in range(2)]
    assert float(sum(part.loss for part in parts)) == pytest.approx(whole.loss.item(), abs=1e-6)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, abs=1e-6)


def test_coefficients_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="ce_coef -1"):
        PolicyGradientLoss(ce_coef=-1)
    with pytest.raises(ValueError, match="one must be above 0"):
        PolicyGradientLoss(rl_coef=0, ce_coef=0)
    with pytest.raises(ValueError, match="with_target=True"):
        PolicyGradientLoss(ce_coef=1)(
            Logprobs(rollout=torch.zeros(1, 1, 1, 1)),
            torch.ones(1, 1, 1),
            batch_of([[0, 0]]),
            rollouts_of([[[[True]]]]),
        )
