"""The recipe with adapters: what trains, what is frozen, and what a checkpointer gathers of it."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torchao.dtypes.nf4tensor import NF4Tensor

from components.models import adapter_config, load_lora_decoder, read_config, write_adapter
from components.training import load_config, stop
from recipes.ebft import EBFTRecipe
from tests.checkpoints import write_checkpoint, write_corpus
from tests.tiny import whole

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_135m" / "lora.yaml"
# Matrices that 4 bits can hold.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 4}


@pytest.fixture
def overrides(tmp_path):
    checkpoint, corpus = write_checkpoint(tmp_path / "checkpoint", **SHAPE), write_corpus(tmp_path)
    yield [
        f"model.checkpoint_dir={checkpoint}",
        f"dataset.source.path={corpus}",
        f"output_dir={tmp_path / 'run'}",
        "dataset.seq_len=48",
        "~metric_logger",
        "~validation",
    ]
    stop()


def values(policy):
    """Copies of all weights, whole."""
    state = policy.decoder.state_dict()
    return {
        name: value.get_original_weight() if isinstance(value, NF4Tensor) else whole(value)
        for name, value in state.items()
    }


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

    gathered = get_model_state_dict(
        recipe.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
    adapters = {name.removeprefix("decoder."): value for name, value in gathered.items()}
    directory = recipe.cfg.model.checkpoint_dir
    write_adapter(tmp_path, adapters, read_config(directory), adapter_config(recipe.policy.decoder, directory))
    again = load_lora_decoder(directory, adapter_dir=tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.items() if ".lora_" in name)
