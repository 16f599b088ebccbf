"""One whole step, ours against the obvious implementation: the same rollouts, features, rewards, loss and gradients."""

import pytest
import torch

from benchmarks.obvious import ObviousGenerator, ObviousNetwork, ObviousPolicy
from components.advantages import RLOO
from components.blocks import StridedAnchors
from components.features import FrozenNetwork, HiddenStateFeatures
from components.losses import PolicyGradientLoss
from components.models import Policy
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from tests.tiny import tiny_batch, tiny_decoder


def step(policy, generator, network, batch):
    """The recipe's six calls."""
    rollouts = generator(policy, batch, torch.Generator().manual_seed(0))
    features = HiddenStateFeatures(network=network)(batch, rollouts)
    rewards = FeatureMatchingReward()(batch, rollouts, features)
    advantages = RLOO()(rewards)
    logprobs = policy(batch, rollouts, temperature=generator.temperature, with_target=True)
    loss = PolicyGradientLoss(ce_coef=0.1)(logprobs, advantages, batch, rollouts).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in policy.decoder.named_parameters()}
    return rollouts, features, advantages, loss, grads


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_step_is_the_obvious_step(family):
    settings = {
        "anchors": StridedAnchors(stride=3, context_len=2, document_mask=True),
        "rollout_len": 4,
        "num_samples": 3,
        "temperature": 0.7,
    }
    batch = tiny_batch()
    ours = step(
        Policy(tiny_decoder(family=family)),
        BlockParallelGenerator(**settings),
        FrozenNetwork(tiny_decoder(family=family)),
        batch,
    )
    obvious = step(
        ObviousPolicy(tiny_decoder(family=family)),
        ObviousGenerator(**settings),
        ObviousNetwork(tiny_decoder(family=family)),
        batch,
    )
    assert torch.equal(ours[0].tokens, obvious[0].tokens)
    close = {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(ours[0].logprobs, obvious[0].logprobs, **close)
    torch.testing.assert_close(ours[1].rollout, obvious[1].rollout, **close)
    torch.testing.assert_close(ours[1].target, obvious[1].target, **close)
    torch.testing.assert_close(ours[2], obvious[2], atol=1e-3, rtol=0)  # whitening divides by small singular values
    torch.testing.assert_close(ours[3], obvious[3], atol=1e-4, rtol=0)
    for name, expected in obvious[4].items():
        scale = expected.abs().max()
        torch.testing.assert_close(ours[4][name] / scale, expected / scale, atol=1e-3, rtol=0, msg=name)
