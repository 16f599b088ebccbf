"""The loss by hand, its gradient, and that parts of a step add up to the step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.losses import PolicyGradientLoss, TokenCounts, kl_estimate, learned_tokens
from components.schedules import DelayedWarmup, Linear
from components.types import Batch, Logprobs, Rollouts

ESTIMATORS = ("k1", "k2", "k3")


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


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("anything", [torch.nan, torch.inf, -1e4])
def test_what_is_masked_may_be_anything(estimator, anything):
    rollouts = rollouts_of([[[[True, False]]]])
    logprobs = torch.tensor([[[[-1.0, anything]]]], requires_grad=True)
    reference = torch.tensor([[[[-1.0, 2 * anything]]]])
    loss = PolicyGradientLoss(kl_coef=1.0, kl_estimator=estimator)
    out = loss(Logprobs(rollout=logprobs), torch.ones(1, 1, 1), batch_of([[0, 0]]), rollouts, reference=reference)
    assert out.loss.item() == -1
    out.loss.backward()
    assert logprobs.grad.tolist() == [[[[-1, 0]]]]


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
    reference = torch.randn(2, 3, 4, 5, generator=generator)
    loss = PolicyGradientLoss(rl_coef=0.7, ce_coef=0.3, kl_coef=0.2)
    whole = loss(logprobs, advantages, batch, rollouts, reference=reference)

    def row(i):
        here = slice(i, i + 1)
        return (
            Logprobs(rollout=logprobs.rollout[here], target=logprobs.target[here]),
            advantages[here],
            Batch(tokens=batch.tokens[here], doc_ids=batch.doc_ids[here], target_mask=batch.target_mask[here]),
            rollouts_of(mask[here].tolist()),
        )

    counts = TokenCounts.of(row(0)[2], row(0)[3]) + TokenCounts.of(row(1)[2], row(1)[3])
    parts = [loss(*row(i), counts, reference=reference[i : i + 1]) for i in range(2)]
    assert float(sum(part.loss for part in parts)) == pytest.approx(whole.loss.item(), abs=1e-6)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, abs=1e-6)


def test_coefficients_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="ce_coef -1"):
        PolicyGradientLoss(ce_coef=-1)
    with pytest.raises(ValueError, match="kl_coef -0.1"):
        PolicyGradientLoss(kl_coef=-0.1)
    with pytest.raises(ValueError, match="choose one of k1, k2, k3"):
        PolicyGradientLoss(kl_estimator="abs")
    with pytest.raises(ValueError, match="one must be above 0"):
        PolicyGradientLoss(rl_coef=0, ce_coef=0, kl_coef=1)
    with pytest.raises(ValueError, match="with_target=True"):
        PolicyGradientLoss(ce_coef=1)(
            Logprobs(rollout=torch.zeros(1, 1, 1, 1)),
            torch.ones(1, 1, 1),
            batch_of([[0, 0]]),
            rollouts_of([[[[True]]]]),
        )
    with pytest.raises(ValueError, match="no reference log-probs"):
        PolicyGradientLoss(kl_coef=1)(
            Logprobs(rollout=torch.zeros(1, 1, 1, 1)),
            torch.ones(1, 1, 1),
            batch_of([[0, 0]]),
            rollouts_of([[[[True]]]]),
        )


LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("estimator", "values", "gradients"),
    [
        # The log-ratios -log 2 and log 2 (ref half as likely, then twice as likely). k1 weighs a token by its own and the
        # later -r, here log 2 - log 2 = 0 and -log 2; k2 by -r; k3 by 1 - e^r.
        ("k1", [LOG2, -LOG2], [0.0, -LOG2]),
        ("k2", [LOG2**2 / 2, LOG2**2 / 2], [LOG2, -LOG2]),
        ("k3", [0.5 - 1 + LOG2, 2 - 1 - LOG2], [0.5, -1.0]),
    ],
)
def test_kl_estimates_by_hand(estimator, values, gradients):
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    estimate = kl_estimate(torch.tensor([-1.0 - LOG2, -2.0 + LOG2]) - logprobs, estimator)
    torch.testing.assert_close(estimate.detach(), torch.tensor(values))
    estimate.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradients))


def test_kl_term_is_the_mean_over_tokens_that_count():
    """Two samples of two tokens, the last masked: log-ratios -1, 1 and 1; k2 gives 1/2 each, times 0.1 over 3 tokens."""
    rollouts = rollouts_of([[[[True, True]], [[True, False]]]])
    logprobs = torch.tensor([[[[-1.0, -2.0]], [[-3.0, -4.0]]]], requires_grad=True)
    reference = torch.tensor([[[[-2.0, -1.0]], [[-2.0, -9.0]]]])
    loss = PolicyGradientLoss(kl_coef=0.1)
    out = loss(Logprobs(rollout=logprobs), torch.zeros(1, 2, 1), batch_of([[0, 0]]), rollouts, reference=reference)
    assert out.metrics["kl"] == pytest.approx(0.5)
    assert out.loss.item() == pytest.approx(0.05)
    out.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[[[0.1, -0.1]], [[-0.1, 0.0]]]]) / 3)


class TwoTokens:
    """All rollouts of two tokens out of three, under a policy with a logit for each and a reference, in float64."""

    def __init__(self, seed, distance):
        generator = torch.Generator().manual_seed(seed)
        # [:, 0] are the first token's logits, [:, 1 + i] the second's after token i.
        self.logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        shift = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        self.policy = self.logits.log_softmax(dim=0)
        self.reference = (self.logits.detach() + distance * shift).log_softmax(dim=0)

    def rollouts(self, table):
        """``[9, 2]``: log-probs of the nine rollouts."""
        return torch.stack([torch.stack((table[i, 0], table[j, 1 + i])) for i in range(3) for j in range(3)])

    def expected(self, estimator):
        """The mean over all rollouts, each as likely as the policy draws it, of the sum over its tokens."""
        logprobs = self.rollouts(self.policy)
        estimate = kl_estimate(self.rollouts(self.reference) - logprobs, estimator)
        return (logprobs.sum(dim=1).exp().detach() * estimate.sum(dim=1)).sum()

    def divergence(self):
        """``KL(pi || ref)`` of whole rollouts."""
        logprobs = self.rollouts(self.policy).sum(dim=1)
        return (logprobs.exp() * (logprobs - self.rollouts(self.reference).sum(dim=1))).sum()

    def tokenwise(self, p, q):
        """``KL(p || q)`` of each token's distribution, averaged over the prefixes that the policy draws, as constants."""
        prefixes = torch.cat((torch.ones(1, dtype=torch.float64), self.policy[:, 0].exp().detach()))
        return (prefixes * (p.exp() * (p - q)).sum(dim=0)).sum()

    def gradient(self, value):
        return torch.autograd.grad(value, self.logits, retain_graph=True)[0]


SEEDS, DISTANCES = st.integers(0, 2**16), st.floats(0.1, 2.0)
EXACT = {"atol": 1e-10, "rtol": 1e-8}


@given(SEEDS, DISTANCES)
def test_k1_and_k3_are_the_divergence_on_average(seed, distance):
    case = TwoTokens(seed, distance)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(case.expected(estimator), case.divergence(), **EXACT)


@given(SEEDS, st.floats(0.01, 0.5))
def test_k2_is_the_divergence_to_second_order(seed, distance):
    """It is where Taylor's series of k3 breaks off: what is left out is at most ``|r|^3 e^|r| / 6``."""
    case = TwoTokens(seed, distance)
    logprobs = case.rollouts(case.policy).detach()
    r = (case.rollouts(case.reference) - logprobs).abs()
    left_out = (logprobs.sum(dim=1).exp() * (r**3 * r.exp() / 6).sum(dim=1)).sum()
    assert (case.expected("k2") - case.divergence()).abs() <= left_out + 1e-12


@given(SEEDS, DISTANCES)
def test_the_gradient_of_k1_is_that_of_the_divergence_of_whole_rollouts(seed, distance):
    case = TwoTokens(seed, distance)
    torch.testing.assert_close(case.gradient(case.expected("k1")), case.gradient(case.divergence()), **EXACT)


@given(SEEDS, DISTANCES)
def test_the_gradient_of_k2_is_that_of_each_tokens_divergence(seed, distance):
    case = TwoTokens(seed, distance)
    expected = case.gradient(case.tokenwise(case.policy, case.reference))
    torch.testing.assert_close(case.gradient(case.expected("k2")), expected, **EXACT)


@given(SEEDS, DISTANCES)
def test_the_gradient_of_k3_is_that_of_each_tokens_divergence_the_other_way(seed, distance):
    case = TwoTokens(seed, distance)
    expected = case.gradient(case.tokenwise(case.reference, case.policy))
    torch.testing.assert_close(case.gradient(case.expected("k3")), expected, **EXACT)


def test_coefficients_follow_their_schedules():
    """Advantage 1 and a cross-entropy of 2 nats: -rl_coef + 2 * ce_coef + 2 * kl_coef (k2 of a log-ratio of -2)."""
    loss = PolicyGradientLoss(
        rl_coef=DelayedWarmup(value=1.0, delay=1, warmup=1),
        ce_coef=Linear(start=0.4, end=0.0, steps=4),
        kl_coef=DelayedWarmup(value=0.1, delay=2),
    )
    assert loss.uses_target
    assert loss.uses_reference
    logprobs = Logprobs(rollout=torch.full((1, 1, 1, 1), -1.0), target=torch.tensor([[-2.0]]))
    reference = torch.full((1, 1, 1, 1), -3.0)
    given = (logprobs, torch.ones(1, 1, 1), batch_of([[0, 0]]), rollouts_of([[[[True]]]]))
    losses = [float(loss(*given, reference=reference, step=step).loss) for step in range(5)]
    assert losses == pytest.approx([0.8, -0.5 + 0.6, -1 + 0.4 + 0.2, -1 + 0.2 + 0.2, -1 + 0.2])


def test_what_no_step_uses_is_not_asked_for():
    assert not PolicyGradientLoss().uses_target
    assert not PolicyGradientLoss().uses_reference
    assert PolicyGradientLoss(kl_coef=0.1).uses_reference
