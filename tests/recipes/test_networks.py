"""Runs of the recipe with each feature network."""

import pytest
import torch

from components.training import stop
from tests.checkpoints import write_checkpoint
from tests.processes import finish, launch, recipe
from tests.recipes.test_checkpoints import equal, result
from tests.recipes.test_ebft import build, material, overrides, train  # noqa: F401

NETWORK = "feature_extractor.network"
LORA = ("model=components.models.load_lora_decoder", "model.lora_rank=4", "lr_scheduler.warmup=0")
ADAPTER_FREE = (f"{NETWORK}=components.features.AdapterFree", f"~{NETWORK}.decoder")
AVERAGE = (f"{NETWORK}=components.features.MovingAverage", f"{NETWORK}.decay=0.5")
INT8 = f"{NETWORK}.quantization={{_component_: torchao.quantization.Int8WeightOnlyConfig, set_inductor_config: false}}"
REFERENCE = ("reference={_component_: components.features.NetworkReference}", "loss.kl_coef=0.1")


@pytest.fixture(autouse=True)
def _leave_group():
    yield
    stop()


@pytest.fixture
def short(overrides):  # noqa: F811
    return [*overrides, "~validation"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_without_adapters_in_its_features_is_one_with_a_frozen_copy(short, tmp_path, dtype):
    """Bitwise, log and weights, with the reference of a KL term besides; nothing but the adapters is held twice."""
    settings = [*short, *LORA, *REFERENCE, f"dtype={dtype}"]
    train([*settings, f"{NETWORK}.keep_head=true"])
    run, _, _ = train([*settings, *ADAPTER_FREE, f"output_dir={tmp_path / 'free'}"])
    assert equal(result(tmp_path / "free"), result(tmp_path / "run"))
    assert run.feature_extractor.network.policy is run.policy is run.reference.policy


def test_an_average_follows_the_policy_and_is_resumed_exactly(short, tmp_path):
    """Its tensors come from the checkpoint, and its identity is that of its start. One process bitwise."""
    run, _, _ = train([*short, *AVERAGE])
    straight = {name: value.clone() for name, value in run.extra.items()}
    parts = [*short, *AVERAGE, f"output_dir={tmp_path / 'parts'}", "resume_with_changes=[max_steps]"]
    train([*parts, "max_steps=2"])
    resumed, _, _ = train(parts)
    assert equal(result(tmp_path / "parts"), result(tmp_path / "run"))
    assert all(torch.equal(value, straight[name]) for name, value in resumed.extra.items())
    stop()
    moved = build([*short, *AVERAGE, f"output_dir={tmp_path / 'third'}"]).extra
    assert not any(torch.equal(value, moved[name]) for name, value in straight.items())


def test_an_average_is_resumed_by_another_number_of_processes(short, tmp_path):
    settings = [
        *short,
        *AVERAGE,
        "loss.rl_coef=1.0e-12",  # features are read, and a token tipped by rounding moves no weight
        "loss.ce_coef=1",
        "~lr_scheduler",
        "resume_with_changes=[max_steps]",
    ]
    settings += ["optimizer=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=0.1"]
    assert finish(launch(2, recipe, settings)) == [0, 0]
    parts = [*settings, f"output_dir={tmp_path / 'parts'}"]
    assert finish(launch(1, recipe, [*parts, "batch_size=4", "max_steps=2"])) == [0]
    assert finish(launch(2, recipe, parts)) == [0, 0]
    (resumed, log), (straight, straight_log) = result(tmp_path / "parts"), result(tmp_path / "run")
    for name in straight:
        torch.testing.assert_close(resumed[name], straight[name], atol=1e-5, rtol=0)
    fm = [[row["feature_matching_loss"] for row in rows] for rows in (log, straight_log)]
    assert fm[0] == pytest.approx(fm[1], abs=1e-4)


def test_after_a_warm_start_features_are_those_of_the_base(short, tmp_path):
    """The policy from one checkpoint, the network from another."""
    tuned = write_checkpoint(tmp_path / "tuned", seed=5)
    base = next(line for line in short if line.startswith("model.checkpoint_dir")).partition("=")[2]
    run = build([*short, f"model.checkpoint_dir={tuned}", f"{NETWORK}.decoder.checkpoint_dir={base}"])
    plain = build([*short, f"output_dir={tmp_path / 'plain'}"])
    assert run.frozen == plain.frozen
    name = "decoder.layers.0.attn.q_proj.weight"
    assert not torch.equal(run.policy.state_dict()[name], plain.policy.state_dict()[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_int8_network_trains(short, dtype):
    run, _, log = train([*short, INT8, f"dtype={dtype}"])
    assert len(log) == 4
    network = run.feature_extractor.network.decoder
    assert type(network.layers[0].mlp.w1.weight).__name__ == "AffineQuantizedTensor"
    assert type(network.tok_embeddings.weight) is torch.nn.Parameter


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ADAPTER_FREE, "feature_extractor.network: AdapterFree needs a policy with adapters"),
        ((*LORA, *AVERAGE), "the model trains adapters only"),
        ((*AVERAGE[:1], f"{NETWORK}.decay=2"), "feature_extractor.network: decay is 2"),
        ((*AVERAGE, *REFERENCE), "has no head to score rollouts with"),
        ((f"{NETWORK}.quantization=int8",), "quantization is 'int8'; name a config"),
        ((INT8, f"{NETWORK}.shard=true"), "shard is true with quantization"),
        (
            (f"{NETWORK}.quantization={{_component_: components.features.NF4WeightOnlyConfig}}",),
            r"quantization: .* cannot hold layers.0.attn.q_proj.weight \[32, 32\]",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused_at_the_start(short, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        build([*short, *settings])
    assert "\n" not in str(error.value)
