"""Log-probs of the head in chunks, with their own backward, against autograd over all logits at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.models import head


def inputs(rows, tokens, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(11, 5, generator=generator, dtype=dtype).requires_grad_()
    groups = [
        (
            torch.randn(R, 5, generator=generator, dtype=dtype).requires_grad_(),
            torch.randint(0, 11, (R, m), generator=generator),
        )
        for R, m in zip(rows, tokens, strict=True)
    ]
    return weight, groups


@given(
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    tokens=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    chunk=st.integers(1, 8),
    kept=st.integers(0, 200),
    dead=st.integers(0, 6),
    seed=st.integers(0, 50),
)
@settings(max_examples=60)
def test_values_and_gradients_are_those_of_all_logits_at_once(rows, tokens, chunk, kept, dead, seed):
    """For any groups, any chunks and however much is kept for the backward, a token asked for twice in a row included; and rows
    without a gradient change nothing."""
    weight, groups = inputs(rows, tokens[: len(rows)], seed=seed)
    before = head.LOGITS_ELEMENTS, head.KEPT_ELEMENTS
    head.LOGITS_ELEMENTS, head.KEPT_ELEMENTS = chunk * len(weight), kept
    leaves = [weight, *(hidden for hidden, _ in groups)]
    try:
        got = head.token_logprobs(weight, *groups)
        wanted = [(hidden @ weight.T).log_softmax(dim=-1).gather(1, t) for hidden, t in groups]
        scales = [torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)) for out in got]
        for scale in scales:
            scale[dead:] = 0.0
        loss, expected = (sum((o * s).sum() for o, s in zip(outs, scales, strict=True)) for outs in (got, wanted))
        grads, wanted_grads = (torch.autograd.grad(total, leaves) for total in (loss, expected))
    finally:
        head.LOGITS_ELEMENTS, head.KEPT_ELEMENTS = before
    for one, other in zip([*got, *grads], [*wanted, *wanted_grads], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_rows_without_a_gradient_form_no_logits(monkeypatch):
    """Of three rows one counts: the backward forms one row of logits. A group that nothing depends on forms none."""
    weight, groups = inputs([3, 4], [1, 1])
    monkeypatch.setattr(head, "KEPT_ELEMENTS", 0)
    counted, _ = head.token_logprobs(weight, *groups)
    formed, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: formed.append(len(self)) or softmax(self, dim=dim))
    counted[1].sum().backward()
    assert formed == [1]


def test_a_second_backward_through_what_was_kept_is_the_first():
    weight, groups = inputs([3], [2])
    (out,) = head.token_logprobs(weight, *groups)
    first, second = (torch.autograd.grad(out.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("trained", ["weight", "hidden"])
def test_only_what_is_trained_gets_a_gradient(trained):
    weight, ((hidden, tokens),) = inputs([3], [2])
    (weight if trained == "hidden" else hidden).requires_grad_(False)
    head.token_logprobs(weight, (hidden, tokens))[0].sum().backward()
    assert (weight.grad is not None) == (trained == "weight")
    assert (hidden.grad is not None) == (trained == "hidden")


def test_in_bf16_a_logprob_keeps_more_than_eight_bits():
    weight, ((hidden, tokens),) = inputs([3], [2], dtype=torch.bfloat16)
    (got,) = head.token_logprobs(weight, (hidden, tokens))
    expected = (hidden.float() @ weight.float().T).log_softmax(dim=-1).gather(1, tokens)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)
