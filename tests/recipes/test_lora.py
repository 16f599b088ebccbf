"""The recipe with adapters: what trains, what is frozen, what its checkpoints hold, and that resuming them is exact."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from components.models import load_lora_decoder
from components.training import list_checkpoints, load_config, read_metrics, stop
from recipes.ebft import EBFTRecipe
from tests.checkpoints import write_checkpoint, write_corpus
from tests.processes import finish, launch, recipe
from tests.recipes.test_ebft import numbers
from tests.tiny import whole

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_135m" / "lora.yaml"
# Matrices that 4 bits can hold.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 4}
QUANTIZED = "model.quantize_base=true"


@pytest.fixture
def overrides(tmp_path):
    checkpoint, corpus = write_checkpoint(tmp_path / "checkpoint", **SHAPE), write_corpus(tmp_path)
    yield [
        f"model.checkpoint_dir={checkpoint}",
        f"dataset.source.path={corpus}",
        f"output_dir={tmp_path / 'run'}",
        "dataset.seq_len=48",
        "save_every_n_steps=2",
        "~metric_logger",
        "~validation",
    ]
    stop()


def values(policy):
    """Copies of all weights, whole."""
    return {name: whole(value) for name, value in policy.decoder.state_dict().items()}


def train(settings):
    """To the end; weights and logged numbers."""
    run = EBFTRecipe(load_config(CONFIG, settings))
    run.setup()
    run.train()
    weights = values(run.policy)
    stop()
    return weights, numbers(read_metrics(run.output_dir))


@pytest.mark.parametrize(
    "options", [[], ["dtype=bf16"], ["model.quantize_base=true"], ["activation_checkpointing=true"]]
)
def test_only_adapters_train_and_they_are_all_there_is_to_save(overrides, tmp_path, options):
    recipe = EBFTRecipe(load_config(CONFIG, [*overrides, *options]))
    recipe.setup()
    before = values(recipe.policy)
    for _ in range(2):  # B starts at zero, so that A has no gradient in the first step
        metrics = recipe.step([next(recipe.stream)])
        assert metrics["grad_norm"] > 0
        # Sampling and scoring see the same adapters; bfloat16 keeps 8 bits of activations around 1.
        assert metrics["logprob_gap"] < (0.1 if "dtype=bf16" in options else 1e-4)
    after = values(recipe.policy)
    for name in before:
        assert torch.equal(before[name], after[name]) != (".lora_" in name), name
    optimized = sum(p.numel() for group in recipe.optimizer.param_groups for p in group["params"])
    assert optimized == sum(value.numel() for name, value in after.items() if ".lora_" in name)


def test_a_checkpoint_is_the_adapters_and_a_model_that_computes_as_the_policy(overrides, tmp_path):
    weights, _ = train([*overrides, "max_steps=2"])
    checkpoint = tmp_path / "run" / "step_000002"
    base = tmp_path / "checkpoint"
    saved = FileSystemReader(checkpoint / "state").read_metadata().state_dict_metadata
    tensors = {name.rpartition(".decoder.")[2] for name in saved if ".decoder." in name}
    assert tensors
    assert all(".lora_" in name for name in tensors)

    again = load_lora_decoder(base, adapter_dir=checkpoint / "adapter")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32)(tokens).logits
        expected = again(tokens)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert (merged - plain).abs().max() > 0.01


def test_adapters_alone_are_saved_if_the_model_is_not_wanted(overrides, tmp_path):
    train([*overrides, "max_steps=2", "checkpointer.save_merged=false"])
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert {path.name for path in checkpoint.iterdir()} == {"adapter", "state", "training_state.pt", "checkpoint.json"}
    assert train([*overrides, "max_steps=3", "resume_with_changes=[max_steps]"])


def test_adapters_are_not_resumed_on_another_base(overrides, tmp_path):
    settings = [*overrides, "max_steps=2", "loss.rl_coef=0", "loss.ce_coef=1"]
    train(settings)
    file = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"model reads frozen weights \w{16}, and .*step_000002 was trained with \w{16}"
    ):
        train([*settings, "max_steps=3", "resume_with_changes=[max_steps]"])


def test_a_checkpoint_is_of_the_model_that_trains(overrides, tmp_path):
    with pytest.raises(
        ValueError, match=r"checkpointer.checkpoint_dir is '.*other' and model.checkpoint_dir '.*checkpoint'"
    ):
        train([*overrides, f"checkpointer.checkpoint_dir={tmp_path / 'other'}"])


@pytest.mark.parametrize("options", [[], [QUANTIZED]], ids=["lora", "qlora"])
def test_a_resumed_run_is_one_that_never_stopped(overrides, tmp_path, options):
    """Bitwise: weights, those of 4 bits too, and every logged number."""
    settings = [*overrides, *options, "max_steps=4", "lr_scheduler.warmup=0"]
    weights, log = train(settings)
    halves = [*settings, f"output_dir={tmp_path / 'halves'}"]
    train([*halves, "max_steps=2"])
    resumed, resumed_log = train([*halves, "resume_with_changes=[max_steps]"])
    assert resumed_log == log
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


@pytest.mark.parametrize("options", [[], [QUANTIZED]], ids=["lora", "qlora"])
def test_two_processes_go_on_as_if_they_had_not_stopped(overrides, tmp_path, options):
    """And so does one process from where two stopped."""
    settings = [*overrides, "model=components.models.load_lora_decoder", *options, "lr_scheduler.warmup=0"]
    parts = [*settings, f"output_dir={tmp_path / 'parts'}", "resume_with_changes=[max_steps]"]
    assert finish(launch(2, recipe, [*settings, "max_steps=6"])) == [0, 0]
    assert finish(launch(2, recipe, [*parts, "max_steps=2"])) == [0, 0]
    assert finish(launch(1, recipe, [*parts, "batch_size=4", "max_steps=4"])) == [0]
    assert finish(launch(2, recipe, [*parts, "max_steps=6"])) == [0, 0]
    straight, resumed = (load_file(tmp_path / name / "step_000006" / "model.safetensors") for name in ("run", "parts"))
    for name in straight:
        torch.testing.assert_close(resumed[name], straight[name], atol=1e-6, rtol=0)
