"""Hugging Face directories: every family against transformers, both ways, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from components.models import build_decoder, from_hf, load_decoder, parse_dtype, read_config, to_hf
from tests.tiny import tiny_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": {"family": "llama", "tie_word_embeddings": False},
    "llama_tied": {"family": "llama"},
    "llama_scaled_rope": {"family": "llama", "rope_scaling": LLAMA3},
    "qwen2": {"family": "qwen2", "tie_word_embeddings": False},
    "qwen2_tied": {"family": "qwen2"},
    "mistral": {"family": "mistral", "sliding_window": None},
}


def reference(directory, changes):
    """A random transformers model, saved as it saves itself, with biases and norms away from their initial values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(**changes))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    model.save_pretrained(directory)
    return model


@pytest.fixture(params=MODELS)
def pair(request, tmp_path):
    return reference(tmp_path, MODELS[request.param]), tmp_path


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    model, directory = pair
    tokens = torch.randint(0, 61, (2, 100), generator=torch.Generator().manual_seed(1))
    ours = load_decoder(directory)(tokens)
    torch.testing.assert_close(ours, model(tokens).logits, atol=2e-4, rtol=1e-4)  # rope is computed in another order


def test_weights_survive_the_way_there_and_back(pair):
    _, directory = pair
    original = load_file(directory / "model.safetensors")
    config = read_config(directory)
    back = to_hf(load_decoder(directory).state_dict(), config)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_weights_may_be_in_several_files(pair):
    model, directory = pair
    whole = load_decoder(directory).state_dict()
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    parts = load_decoder(directory).state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_weights_come_in_the_dtype_asked_for(pair):
    _, directory = pair
    decoder = load_decoder(directory, "bf16")
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}
    assert decoder.layers[0].attn.pos_embeddings.cache.dtype == torch.float32  # a position is not exact in bfloat16


def test_a_tied_head_saved_all_the_same_is_not_a_second_one(tmp_path):
    reference(tmp_path, MODELS["llama_tied"])
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": torch.zeros(61, 32)}, tmp_path / "model.safetensors")
    assert load_decoder(tmp_path)(torch.zeros(1, 3, dtype=torch.long)).abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"family": "qwen2", "rope_scaling": LLAMA3}, "rope_scaling"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"head_dim": 16}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"family": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"family": "mistral", "tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_what_the_builders_would_ignore_is_refused(changes, key):
    with pytest.raises(ValueError, match=f"{key} .* is not supported"):
        build_decoder(tiny_config(**changes))


def test_a_sliding_window_limits_the_length():
    assert build_decoder(tiny_config(family="mistral", sliding_window=32)).max_seq_len == 32
    assert build_decoder(tiny_config(), max_seq_len=48).max_seq_len == 48


def test_missing_and_broken_directories_are_named(tmp_path):
    with pytest.raises(ValueError, match="no config.json in checkpoint_dir"):
        load_decoder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        load_decoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_decoder(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path):
    reference(tmp_path, MODELS["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing: .'norm.scale'"):
        load_decoder(tmp_path)
    with pytest.raises(ValueError, match="do not belong to a llama checkpoint"):
        from_hf({"transformer.h.0.weight": torch.zeros(1)}, tiny_config())


def test_dtypes_by_name():
    assert parse_dtype("fp32") is torch.float32
    assert parse_dtype(torch.float64) is torch.float64
    with pytest.raises(ValueError, match="dtype 'fp8' is not supported"):
        parse_dtype("fp8")
