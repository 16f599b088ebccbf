"""Feature networks other than the plain frozen one: quantised, adapters off, moving averages."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.dtypes.nf4tensor import NF4Tensor
from torchao.quantization import Int8WeightOnlyConfig

from components.features import (
    AdapterFree,
    FrozenNetwork,
    HiddenStateFeatures,
    MovingAverage,
    NetworkReference,
    NF4WeightOnlyConfig,
)
from components.models import (
    Policy,
    ReferencePolicy,
    deferred_weights,
    load_decoder,
    load_lora_decoder,
    materialize,
)
from tests.checkpoints import write_model
from tests.tiny import tiny_batch, tiny_decoder, tiny_rollouts
from tests.unit.test_lora import trained

BATCH = tiny_batch()
ROLLOUTS = tiny_rollouts(BATCH)
LORA = {"apply_lora_to_output": False}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}


def features(network):
    return HiddenStateFeatures(network=network)(BATCH, ROLLOUTS)


def int8():
    return Int8WeightOnlyConfig(set_inductor_config=False)


# ------------------------------------------------------------------------------------------------ quantised


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_features_are_those_of_the_weights_that_int8_can_say(dtype):
    """In bfloat16 the product of activations and integers is rounded before it is scaled: features of length 1 within 0.05."""
    decoder, rounded = (tiny_decoder(dtype=dtype) for _ in range(2))
    network = FrozenNetwork(decoder, quantization=int8())
    for name, part in rounded.layers.named_modules():
        if isinstance(part, torch.nn.Linear):
            part.weight.data.copy_(network.decoder.layers.get_submodule(name).weight.dequantize())
    got, expected, exact = (features(each) for each in (network, FrozenNetwork(rounded), FrozenNetwork(decoder)))
    assert not torch.equal(got.rollout, exact.rollout)
    atol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(got.rollout, expected.rollout, atol=atol, rtol=0)
    assert F.cosine_similarity(got.rollout, exact.rollout, dim=-1).mean() > 0.999


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nf4_features_are_those_of_the_weights_that_four_bits_can_say(family):
    config = NF4WeightOnlyConfig(scaler_block_size=64)
    decoder, rounded = (tiny_decoder(family=family, **WIDE) for _ in range(2))
    for part in rounded.layers.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight.data.copy_(NF4Tensor.from_tensor(part.weight.data, 64, 64).get_original_weight())
    got, expected = features(FrozenNetwork(decoder, quantization=config)), features(FrozenNetwork(rounded))
    torch.testing.assert_close(got.rollout, expected.rollout, atol=2e-5, rtol=1e-5)


def test_deferred_weights_are_quantised_as_they_are_read(tmp_path):
    write_model(tmp_path)
    direct = FrozenNetwork(load_decoder(tmp_path), quantization=int8())
    with deferred_weights():
        later = FrozenNetwork(load_decoder(tmp_path), quantization=int8())
    later.keep_layers(3)
    materialize(later, "cpu")
    assert torch.equal(features(later).rollout, features(direct).rollout)
    assert later.identity() == direct.identity()
    plain = FrozenNetwork(load_decoder(tmp_path))
    plain.keep_layers(3)
    assert later.identity() != plain.identity()


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ({}, {"shard": True, "quantization": int8()}, "shard is true with quantization: .* remove one"),
        ({}, {"shard": True, "keep_head": True}, "shard is true with keep_head"),
        ({}, {"quantization": "int8"}, "quantization is 'int8'; name a config"),
        (
            {},
            {"quantization": NF4WeightOnlyConfig()},
            r"cannot hold layers.0.attn.q_proj.weight \[32, 32\] .*choose another",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(decoder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        FrozenNetwork(tiny_decoder(**decoder), **options)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ adapters off


@pytest.fixture
def checkpoint(tmp_path):
    write_model(tmp_path)
    return tmp_path


def test_a_policy_without_its_adapters_is_a_frozen_network_of_its_base(checkpoint):
    """Bitwise, whatever the adapters have become; and the policy has them again afterwards."""
    policy = Policy(trained(checkpoint, **LORA))
    before = policy(BATCH, ROLLOUTS, temperature=1.0).rollout
    got, expected = features(AdapterFree(policy=policy)), features(FrozenNetwork(load_decoder(checkpoint)))
    assert torch.equal(got.rollout, expected.rollout)
    assert torch.equal(got.target, expected.target)
    assert not torch.equal(features(FrozenNetwork(policy.decoder)).rollout, expected.rollout)
    assert torch.equal(policy(BATCH, ROLLOUTS, temperature=1.0).rollout, before)


def test_its_identity_is_that_of_the_base(checkpoint):
    one, other = (AdapterFree(policy=Policy(trained(checkpoint, seed=seed, **LORA))) for seed in (1, 2))
    assert one.identity() == other.identity()
    other.policy.decoder.layers[0].attn.q_proj.weight.data[0, 0] += 1e-6
    assert one.identity() != other.identity()


def test_a_policy_without_adapters_is_refused():
    with pytest.raises(ValueError, match="needs a policy with adapters"):
        AdapterFree(policy=Policy(tiny_decoder()))


def test_it_is_the_reference_of_its_base_as_well(checkpoint):
    policy = Policy(trained(checkpoint, **LORA))
    reference = NetworkReference(extractor=HiddenStateFeatures(network=AdapterFree(policy=policy)))
    expected = ReferencePolicy(load_decoder(checkpoint))(BATCH, ROLLOUTS, temperature=0.6)
    got = reference(BATCH, ROLLOUTS, temperature=0.6)
    assert torch.equal(got, expected)
    assert not got.requires_grad


# ------------------------------------------------------------------------------------------------ averages


def numbers(network):
    return {name: value.clone() for name, value in network.decoder.state_dict().items()}


def test_an_average_that_keeps_nothing_is_the_policy_and_one_that_keeps_all_never_moves():
    policy = Policy(tiny_decoder(seed=1))
    for decay, expected in ((0.0, policy.decoder), (1.0, tiny_decoder(seed=2))):
        network = MovingAverage(tiny_decoder(seed=2), decay=decay)
        got = HiddenStateFeatures(network=network)
        network.follow(policy, step=1)
        assert all(torch.equal(value, expected.state_dict()[name]) for name, value in numbers(network).items())
        assert torch.equal(got(BATCH, ROLLOUTS).rollout, features(FrozenNetwork(expected)).rollout)


@settings(max_examples=20)
@given(decay=st.floats(0, 1), every=st.integers(1, 3), steps=st.integers(0, 6))
def test_an_average_of_a_policy_that_stands_still_approaches_it_geometrically(decay, every, steps):
    """Against the closed form: what is left of the start is ``decay`` to the number of updates."""
    start, policy = tiny_decoder(seed=2, num_hidden_layers=1), Policy(tiny_decoder(seed=1, num_hidden_layers=1))
    network = MovingAverage(start, decay=decay, every=every)
    for step in range(1, steps + 1):
        network.follow(policy, step=step)
    left = math.pow(decay, steps // every)
    for name, value in numbers(network).items():
        expected = left * start.state_dict()[name] + (1 - left) * policy.decoder.state_dict()[name]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_what_an_average_saves_is_what_moves_and_its_identity_does_not():
    network = MovingAverage(tiny_decoder(seed=2), decay=0.5)
    network.keep_layers(2)
    name = network.identity()
    saved = network.tensors()
    assert len(saved) == 1 + 2 * len(network.decoder.layers[0].state_dict())
    network.follow(Policy(tiny_decoder(seed=1)), step=1)
    assert network.identity() == name
    for value in saved.values():
        value.zero_()
    assert not any(value.any() for value in numbers(network).values())


def test_what_an_average_cannot_follow_is_refused(checkpoint):
    network = MovingAverage(tiny_decoder(), decay=0.9)
    with pytest.raises(ValueError, match="the model trains adapters only"):
        network.check(Policy(load_lora_decoder(checkpoint)))
    with pytest.raises(ValueError, match=r"has tok_embeddings.weight \[61, 32\], unlike the policy"):
        network.check(Policy(tiny_decoder(**WIDE)))
    with pytest.raises(ValueError, match="set the decoder's dtype to fp32"):
        MovingAverage(tiny_decoder(dtype=torch.bfloat16), decay=0.9)
    for options in ({"decay": 1.1}, {"decay": -0.1}, {"decay": 0.9, "every": 0}):
        with pytest.raises(ValueError, match="give a decay from 0 to 1"):
            MovingAverage(tiny_decoder(), **options)
