"""Laws of whitening and of the feature-matching reward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.rewards import FeatureMatchingReward, whiten
from components.rewards.energy import feature_matching_loss
from components.types import Features, Rollouts


def features(seed, n=4, D=12, B=2, K=3):
    generator = torch.Generator().manual_seed(seed)
    rollout = torch.nn.functional.normalize(torch.randn(B, n, K, D, generator=generator), dim=-1)
    target = torch.nn.functional.normalize(torch.randn(B, K, D, generator=generator), dim=-1)
    return Features(rollout=rollout, target=target, mask=torch.ones(B, K, dtype=torch.bool))


def changed(value, rollout=None, target=None, mask=None):
    return Features(
        rollout=value.rollout if rollout is None else rollout,
        target=value.target if target is None else target,
        mask=value.mask if mask is None else mask,
    )


def rollouts_for(value):
    B, n, K = value.rollout.shape[:3]
    tokens = torch.arange(B * n * K).view(B, n, K, 1)
    return Rollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        anchors=torch.ones(B, K, dtype=torch.long),
        logprobs=torch.zeros(tokens.shape),
    )


def score(value, **options):
    return FeatureMatchingReward(**options)(None, rollouts_for(value), value)


def same(one, other, atol=1e-5):
    torch.testing.assert_close(one.pointwise, other.pointwise, atol=atol, rtol=0)
    torch.testing.assert_close(one.pairwise, other.pairwise, atol=atol, rtol=0)


seeds = st.integers(0, 10_000)


@given(seed=seeds, n=st.integers(1, 6))
@settings(max_examples=40)
def test_unwhitened_reward_is_equation_7_written_as_loops(seed, n):
    value = features(seed, n=n)
    got = score(value, whitening="none", alignment_coef=0.7, diversity_coef=0.5)
    for b in range(2):
        for k in range(3):
            phi, y = value.rollout[b, :, k], value.target[b, k]
            for j in range(n):
                others = [float(phi[j] @ phi[i]) for i in range(n) if i != j]
                alignment = 0.7 * 2 * float(phi[j] @ y)  # unit vectors: the cosine is the dot product
                diversity = 0.5 * 2 * sum(others) / max(1, n - 1)
                assert float(got.pointwise[b, j, k]) == pytest.approx(alignment, abs=1e-5)
                assert float(got.pairwise[b, j, k]) == pytest.approx(-diversity, abs=1e-5)


@given(seed=seeds, whitening=st.sampled_from(["feature_space", "sample_space", "none"]))
@settings(max_examples=40)
def test_rotating_feature_space_changes_nothing(seed, whitening):
    value = features(seed)
    rotation, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(seed + 1)))
    turned = changed(value, rollout=value.rollout @ rotation, target=value.target @ rotation)
    # Where a row sum of (XX^T)^(-1/2) is next to 0, its sign, and with it the reward, hangs on rounding.
    if whitening != "sample_space" or _well_conditioned(value):
        same(score(turned, whitening=whitening), score(value, whitening=whitening), atol=1e-4)


def _well_conditioned(value):
    X = value.rollout.double().transpose(1, 2)
    eigenvalues, U = torch.linalg.eigh(X @ X.mT)
    return bool(((U / eigenvalues.sqrt()[..., None, :]) @ U.mT).sum(-1).abs().min() > 1e-3)


@given(seed=seeds, n=st.integers(2, 6))
@settings(max_examples=40)
def test_whitened_independent_samples_are_orthonormal(seed, n):
    """U V^T has orthonormal rows, so independent samples have no similarity left to be penalised for."""
    whitened = whiten(*_block(features(seed, n=n)), "feature_space", 1e-5).rollout
    torch.testing.assert_close(whitened @ whitened.mT, torch.eye(n).double().expand(2, 3, n, n), atol=1e-6, rtol=0)


def _block(value):
    return value.rollout.double().transpose(1, 2), value.target.double()


def test_whitening_by_hand():
    """X = [[3, 0, 0], [0, 4, 0]]: X^T X = diag(9, 16, 0), its pseudo-inverse root diag(1/3, 1/4, 0)."""
    X = torch.tensor([[3.0, 0, 0], [0, 4, 0]]).double()
    y = torch.tensor([6.0, 8, 5]).double()
    whitened = whiten(X, y, "feature_space", 1e-5)
    torch.testing.assert_close(whitened.rollout, torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double())
    torch.testing.assert_close(whitened.target, torch.tensor([[2.0, 2, 0]]).double())
    # (X X^T)^(-1/2) = diag(1/3, 1/4) only scales the target, once per sample.
    rows = whiten(X, y, "sample_space", 1e-5)
    torch.testing.assert_close(rows.rollout, whitened.rollout)
    torch.testing.assert_close(rows.target, torch.stack((y / 3, y / 4)))


def test_duplicate_rollouts_share_one_whitened_direction():
    """Samples (a, a, b) with a, b orthonormal: the singular values are sqrt(2), 1, 0. The copies become a / sqrt(2) each,
    so their dot product is 1/2 and the mean over two others 1/4; times 2, a diversity of 1/2. b keeps length 1, diversity 0.
    """
    a, b = torch.eye(4)[0], torch.eye(4)[1]
    value = Features(
        rollout=torch.stack((a, a, b))[None, :, None], target=a[None, None], mask=torch.ones(1, 1, dtype=torch.bool)
    )
    got = score(value)
    torch.testing.assert_close(got.pairwise[0, :, 0], torch.tensor([-0.5, -0.5, 0.0]))
    torch.testing.assert_close(got.pointwise[0, :, 0], torch.tensor([2.0, 2.0, 0.0]))


@given(seed=seeds)
@settings(max_examples=30)
def test_a_copy_is_rewarded_as_its_original(seed):
    value = features(seed, n=5)
    rollout = value.rollout.clone()
    rollout[:, 3] = rollout[:, 1]
    got = score(changed(value, rollout=rollout))
    torch.testing.assert_close(got.total[:, 3], got.total[:, 1], atol=1e-5, rtol=0)


@given(seed=seeds, rank=st.integers(1, 3))
@settings(max_examples=30)
def test_rank_deficient_samples_become_a_projection(seed, rank):
    """W X of rank r has singular values 1 (r times) and 0: nothing is blown up by a tiny singular value."""
    generator = torch.Generator().manual_seed(seed)
    mix, basis = torch.randn(5, rank, generator=generator), torch.randn(rank, 12, generator=generator)
    whitened = whiten((mix @ basis).double(), torch.randn(12, generator=generator).double(), "feature_space", 1e-5)
    values = torch.linalg.svdvals(whitened.rollout)
    torch.testing.assert_close(values[:rank], torch.ones(rank).double(), atol=1e-5, rtol=0)
    assert values[rank:].abs().max() < 1e-5


@pytest.mark.parametrize("whitening", ["feature_space", "sample_space", "none"])
def test_a_zero_rollout_gets_zero_and_leaves_the_others_their_reward(whitening):
    value = features(0)
    rollout = value.rollout.clone()
    rollout[:, 2] = 0
    got = score(changed(value, rollout=rollout), whitening=whitening)
    torch.testing.assert_close(got.total[:, 2], torch.zeros(2, 3), atol=1e-6, rtol=0)
    if whitening != "sample_space":  # there the row sums, and with them signs, depend on every row
        keep = [0, 1, 3]
        without = score(changed(value, rollout=rollout[:, keep]), whitening=whitening)
        torch.testing.assert_close(got.pointwise[:, keep], without.pointwise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("whitening", ["feature_space", "sample_space", "none"])
def test_all_zero_features_give_zero_rewards(whitening):
    value = features(0)
    got = score(
        changed(value, rollout=torch.zeros_like(value.rollout), target=torch.zeros_like(value.target)),
        whitening=whitening,
    )
    assert torch.equal(got.total, torch.zeros(2, 4, 3))


@given(seed=seeds, scale=st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_whitening_forgets_the_scale_of_features(seed, scale):
    value = features(seed)
    same(score(changed(value, rollout=value.rollout * scale, target=value.target * scale)), score(value), atol=1e-4)


def test_sample_space_differs_from_feature_space_only_in_the_target():
    value = features(3)
    one, other = score(value, whitening="feature_space"), score(value, whitening="sample_space")
    torch.testing.assert_close(one.pairwise, other.pairwise, atol=1e-5, rtol=0)
    assert not torch.allclose(one.pointwise, other.pointwise, atol=1e-2)


def test_negative_target_factors_are_counted():
    """(1, 0) and (1, 0.1) nearly coincide; a long third sample between makes one row of (XX^T)^(-1/2) sum below 0."""
    rollout = torch.tensor([[1.0, 0.0], [3.0, 1.0]])[None, :, None]
    value = Features(rollout=rollout, target=torch.ones(1, 1, 2), mask=torch.ones(1, 1, dtype=torch.bool))
    X = rollout[0, :, 0].double()
    eigenvalues, U = torch.linalg.eigh(X @ X.mT)
    sums = (U / eigenvalues.sqrt()) @ U.mT @ torch.ones(2).double()
    expected = float((sums < 0).double().mean())
    assert expected == 0.5
    assert score(value, whitening="sample_space").metrics["negative_target_factors"] == expected
    assert score(value, whitening="feature_space").metrics["negative_target_factors"] == 0


def test_blocks_that_do_not_count_have_no_reward_and_no_weight():
    value = features(1)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    got = score(changed(value, mask=mask))
    full = score(value)
    counted = mask[:, None].expand(2, 4, 3)
    assert not got.total[~counted].any()
    assert torch.equal(got.total[counted], full.total[counted])
    assert got.metrics["reward"] == pytest.approx(float(full.total[counted].mean()), abs=1e-6)
    nothing = score(changed(value, mask=torch.zeros(2, 3, dtype=torch.bool)))
    assert nothing.metrics["reward"] == 0


def test_feature_matching_loss_is_the_distance_of_means():
    """Samples (1, 0) and (0, 1), target (1, 1): the mean (.5, .5) is .5 away in each coordinate, .5 in all."""
    rollout = torch.eye(2)[None, :, None]
    value = Features(rollout=rollout, target=torch.ones(1, 1, 2), mask=torch.ones(1, 1, dtype=torch.bool))
    assert score(value).metrics["feature_matching_loss"] == pytest.approx(0.5)
    assert score(value, whitening="none").metrics["feature_matching_loss"] == pytest.approx(0.5)
    assert float(feature_matching_loss(whiten(*_block(value), "none", 0.0))) == pytest.approx(0.5)


def test_stacked_layers_are_whitened_apart():
    """One layer stacked is no stack; two layers give the mean of neither: each is whitened with its own samples."""
    value = features(5)
    stacked = changed(value, rollout=value.rollout[..., None, :], target=value.target[..., None, :])
    same(score(stacked), score(value))
    other = features(6)
    two = changed(
        value,
        rollout=torch.stack((value.rollout, other.rollout), dim=-2),
        target=torch.stack((value.target, other.target), dim=-2),
    )
    pairwise = score(value).pairwise + score(other).pairwise  # dot products add up over layers
    torch.testing.assert_close(score(two).pairwise, pairwise, atol=1e-5, rtol=0)


def test_non_finite_features_are_named():
    value = features(0)
    rollout = value.rollout.clone()
    rollout[1, 2, 0, 5] = torch.nan
    with pytest.raises(FloatingPointError, match="sequence 1, block 0"):
        score(changed(value, rollout=rollout))


@pytest.mark.parametrize(
    ("options", "message"), [({"whitening": "pca"}, "whitening is 'pca'"), ({"tolerance": 1.0}, "tolerance is 1.0")]
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureMatchingReward(**options)
