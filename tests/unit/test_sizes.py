"""Sizes by formula against tensors that are really there."""

import pytest
import torch

from benchmarks.sizes import phi_bytes, policy_bytes, sizes_of
from components.estimate import held_bytes
from components.features import FrozenNetwork, HiddenStateFeatures, NF4WeightOnlyConfig
from components.models import Policy, load_decoder, load_lora_decoder
from tests.checkpoints import write_model
from tests.tiny import tiny_batch, tiny_rollouts

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_policy_takes_what_the_formula_says(tmp_path, family, kind):
    config = write_model(tmp_path, family=family, **SHAPE)
    load = (
        load_decoder(tmp_path) if kind == "full" else load_lora_decoder(tmp_path, "bf16", quantize_base=kind == "qlora")
    )
    policy = Policy(load)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    batch = tiny_batch()
    policy(batch, tiny_rollouts(batch), temperature=1.0, with_target=True).rollout.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    held = held_bytes([*policy.parameters(), *(parameter.grad for parameter in trained), *moments])
    # NF4 rounds its numbers of scales up, and keeps a table of its 16 values with each matrix.
    expected = policy_bytes(sizes_of(config), kind, ranks=1)
    assert held == pytest.approx(expected, rel=0.05 if kind == "qlora" else 0)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_a_feature_network_takes_what_the_formula_says(tmp_path, kind):
    config = write_model(tmp_path, **SHAPE)
    quantization = NF4WeightOnlyConfig() if kind == "nf4" else None
    network = FrozenNetwork(load_decoder(tmp_path, "fp32" if kind == "fp32" else "bf16"), quantization=quantization)
    HiddenStateFeatures(network=network)
    expected = phi_bytes(sizes_of(config), kind, ranks=1)
    assert held_bytes(network.parameters()) == pytest.approx(expected, rel=0.05 if kind == "nf4" else 0)
