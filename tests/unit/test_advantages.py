"""Baselines: against recomputation without the sample, and unbiasedness by its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.advantages import RLOO, GroupNorm, Reinforce
from components.types import Rewards


def rewards(pointwise, pairwise=None, mask=None):
    B, _, K = pointwise.shape
    return Rewards(
        pointwise=pointwise,
        pairwise=torch.zeros_like(pointwise) if pairwise is None else pairwise,
        mask=torch.ones(B, K, dtype=torch.bool) if mask is None else mask,
    )


def pairwise_from(kernel):
    """``d_j``: mean of ``kernel[j, k]`` over the others, for one block, as ``[1, n, 1]``."""
    n = len(kernel)
    return torch.stack([kernel[j, torch.arange(n) != j].mean() for j in range(n)])[None, :, None]


@given(seed=st.integers(0, 10_000), n=st.integers(3, 7))
@settings(max_examples=50)
def test_pairwise_baseline_is_the_reward_without_the_sample(seed, n):
    """For each j, remove it, recompute the others' rewards among themselves, and take their mean."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(n, n, generator=generator, dtype=torch.float64)
    kernel = kernel + kernel.T
    pairwise = pairwise_from(kernel)
    point = torch.randn(1, n, 1, generator=generator, dtype=torch.float64)
    got = RLOO()(rewards(point, pairwise))
    for j in range(n):
        others = torch.arange(n) != j
        baseline = point[:, others].mean() + pairwise_from(kernel[others][:, others]).mean()
        assert float(got[0, j, 0]) == pytest.approx(float(point[0, j, 0] + pairwise[0, j, 0] - baseline), abs=1e-5)


@given(seed=st.integers(0, 1000), n=st.integers(3, 6), j=st.integers(0, 5))
@settings(max_examples=50)
def test_a_baseline_does_not_depend_on_its_own_sample(seed, n, j):
    """What makes the gradient unbiased; the plain leave-one-out mean of the sum fails this."""
    j = j % n
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    other = X.clone()
    other[j] = torch.randn(4, generator=generator, dtype=torch.float64)

    def baseline(X):
        value = rewards(X[None, :, :1], pairwise_from(X @ X.T))
        return float((value.total - RLOO()(value))[0, j, 0])

    assert baseline(other) == pytest.approx(baseline(X), abs=1e-5)


def test_two_samples_have_no_pairwise_baseline():
    """Rewards (3, 1) and pairwise (-0.4, -0.4): advantages 3 - 1 - 0.4 and 1 - 3 - 0.4."""
    got = RLOO()(rewards(torch.tensor([[[3.0], [1.0]]]), torch.full((1, 2, 1), -0.4)))
    torch.testing.assert_close(got[0, :, 0], torch.tensor([1.6, -2.4]))


def test_equal_samples_have_no_advantage():
    assert not RLOO()(rewards(torch.full((2, 4, 3), 1.7), torch.full((2, 4, 3), -0.3))).any()
    assert not GroupNorm()(rewards(torch.full((2, 4, 3), 1.7))).any()


def test_group_norm_by_hand():
    """(1, 2, 3): mean 2, unbiased standard deviation 1."""
    got = GroupNorm(eps=0.0)(rewards(torch.tensor([[[1.0], [2.0], [3.0]]])))
    torch.testing.assert_close(got[0, :, 0], torch.tensor([-1.0, 0.0, 1.0]))


def test_reinforce_is_the_reward():
    value = rewards(torch.randn(2, 4, 3), torch.randn(2, 4, 3))
    assert torch.equal(Reinforce()(value), value.total)


@pytest.mark.parametrize("advantage", [RLOO(), GroupNorm(), Reinforce()])
def test_blocks_that_do_not_count_have_no_advantage(advantage):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    got = advantage(rewards(torch.randn(2, 4, 3), torch.randn(2, 4, 3), mask))
    counted = mask[:, None].expand_as(got)
    assert not got[~counted].any()
    assert got[counted].all()
    assert got.dtype == torch.float32


@pytest.mark.parametrize("advantage", [RLOO(), GroupNorm()])
def test_one_sample_cannot_be_compared(advantage):
    with pytest.raises(ValueError, match="at least 2 samples per anchor, generator.num_samples is 1"):
        advantage(rewards(torch.zeros(1, 1, 1)))
