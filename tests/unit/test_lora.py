"""LoRA decoders against plain ones, packed against row by row, and their files against PEFT."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.models.convert_weights import tune_to_peft_adapter_weights
from transformers import AutoModelForCausalLM

from components.models import (
    Policy,
    adapter_config,
    adapter_from_hf,
    adapter_to_hf,
    adapters_disabled,
    deferred_weights,
    load_decoder,
    load_lora_decoder,
    materialize,
    merge_adapters,
    quantized_parameters,
    read_adapter,
    read_config,
    to_hf,
    write_adapter,
)
from tests.checkpoints import write_model
from tests.tiny import VOCAB, row_by_row, tiny_batch, tiny_rollouts

FAMILIES = ("llama", "qwen2", "mistral")
EVERYTHING = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "apply_lora_to_output": True,
    "lora_rank": 3,
    "lora_alpha": 7,
}
# Sums over the same numbers in another order: float32 rounding of values around 10.
CLOSE = {"atol": 5e-5, "rtol": 1e-5}
TOKENS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(5))


def trained(directory, seed=7, **options):
    """A LoRA decoder whose adapters are no longer nothing."""
    torch.manual_seed(seed)
    decoder = load_lora_decoder(directory, **(EVERYTHING | options))
    for name, parameter in decoder.named_parameters():
        if name.endswith("lora_b.weight"):
            parameter.data.normal_(std=0.2)
    return decoder


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path):
    write_model(tmp_path, family=request.param, tie_word_embeddings=False)
    return tmp_path


def test_new_adapters_change_nothing(checkpoint):
    lora, plain = load_lora_decoder(checkpoint, **EVERYTHING), load_decoder(checkpoint)
    assert torch.equal(lora(TOKENS), plain(TOKENS))
    assert not torch.equal(trained(checkpoint)(TOKENS), plain(TOKENS))


def test_disabled_adapters_change_nothing_and_come_back(checkpoint):
    lora = trained(checkpoint)
    before = lora(TOKENS)
    with adapters_disabled(lora):
        assert torch.equal(lora(TOKENS), load_decoder(checkpoint)(TOKENS))
    assert torch.equal(lora(TOKENS), before)


def test_only_adapters_train_and_they_are_float32(checkpoint):
    lora = load_lora_decoder(checkpoint, "bf16", **EVERYTHING)
    for name, parameter in lora.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
    chosen = {
        name.split(".lora_")[0] for name, p in load_lora_decoder(checkpoint).named_parameters() if p.requires_grad
    }
    assert chosen == {f"layers.{layer}.attn.{name}" for layer in range(4) for name in ("q_proj", "v_proj")}


def test_packed_logprobs_and_gradients_are_those_of_one_row_per_block(checkpoint):
    lora = trained(checkpoint)
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(3))
    slow = row_by_row(lora, batch, rollouts, 0.7)
    (slow * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in lora.named_parameters() if parameter.requires_grad}
    lora.zero_grad()
    fast = Policy(lora)(batch, rollouts, temperature=0.7).rollout
    torch.testing.assert_close(fast, slow, **CLOSE)
    (fast * weight).sum().backward()
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            scale = expected[name].abs().max()
            torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, atol=5e-5, rtol=0, msg=name)
        else:
            assert parameter.grad is None


def test_a_bf16_base_stays_close_to_float32(checkpoint):
    """Its head is computed in float32, as a plain one."""
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    exact = Policy(trained(checkpoint))(batch, rollouts, temperature=1.0).rollout
    rounded = Policy(trained(checkpoint, dtype="bf16"))(batch, rollouts, temperature=1.0).rollout
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.15


def test_adapters_are_those_of_the_seed_whether_deferred_or_not(checkpoint):
    torch.manual_seed(3)
    direct = load_lora_decoder(checkpoint, **EVERYTHING).state_dict()
    with deferred_weights():
        later = load_lora_decoder(checkpoint, **EVERYTHING)
    torch.manual_seed(3)
    materialize(later, "cpu")
    assert all(torch.equal(value, direct[name]) for name, value in later.state_dict().items())
    a = direct["layers.0.attn.q_proj.lora_a.weight"]  # [3, 32]: uniform up to 1 / sqrt(32)
    assert 0.8 * 32**-0.5 < a.abs().max() <= 32**-0.5
    torch.manual_seed(4)
    assert not torch.equal(
        a, load_lora_decoder(checkpoint, **EVERYTHING).state_dict()["layers.0.attn.q_proj.lora_a.weight"]
    )


@torch.no_grad()
def test_peft_loads_the_saved_adapter_and_computes_the_same(checkpoint, tmp_path):
    lora = trained(checkpoint)
    write_adapter(tmp_path, lora.state_dict(), read_config(checkpoint), adapter_config(lora, checkpoint))
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["task_type"], adapter["r"], adapter["lora_alpha"]) == (
        "LORA",
        "CAUSAL_LM",
        3,
        7,
    )
    assert {"q_proj", "o_proj", "gate_proj", "lm_head"} < set(adapter["target_modules"])
    assert adapter["base_model_name_or_path"] == str(checkpoint)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in saved
    assert "base_model.model.lm_head.lora_B.weight" in saved
    assert len(saved) == 2 * (4 * 7 + 1)

    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(tuned(TOKENS).logits, lora(TOKENS), atol=5e-4, rtol=1e-4)


@torch.no_grad()
def test_merged_weights_are_a_model_that_transformers_loads(checkpoint):
    lora, config = trained(checkpoint), read_config(checkpoint)
    expected = lora(TOKENS)
    merged = merge_adapters(lora.state_dict(), lora_alpha=7)
    assert {value.dtype for value in merge_adapters(trained(checkpoint, dtype="bf16").state_dict(), 7).values()} == {
        torch.bfloat16
    }
    name = "layers.0.attn.q_proj.weight"
    half = trained(checkpoint, dtype="bf16").state_dict()
    exact = merge_adapters({key: value.float() for key, value in half.items()}, lora_alpha=7)[name]
    assert torch.equal(merge_adapters(half, lora_alpha=7, dtype=torch.float32)[name], exact)
    save_file(to_hf(merged, config), checkpoint / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(load_decoder(checkpoint)(TOKENS), expected, **CLOSE)


def test_a_saved_adapter_is_loaded_exactly(checkpoint, tmp_path):
    lora, config = trained(checkpoint), read_config(checkpoint)
    write_adapter(tmp_path, lora.state_dict(), config, adapter_config(lora))
    again = load_lora_decoder(checkpoint, **EVERYTHING, adapter_dir=tmp_path)
    assert all(torch.equal(value, lora.state_dict()[name]) for name, value in again.state_dict().items())
    read = read_adapter(tmp_path, config)
    assert all(torch.equal(value, lora.state_dict()[name]) for name, value in read.items())
    assert adapter_from_hf(adapter_to_hf(read, config), config).keys() == read.keys()


def test_rows_are_in_the_order_of_torchtunes_own_converter(tmp_path):
    """For llama. For qwen2, whose rows are in order, it permutes them all the same."""
    for family in ("llama", "qwen2"):
        config = write_model(tmp_path / family, family=family)
        lora = trained(tmp_path / family, apply_lora_to_output=False)
        state = {name: value for name, value in lora.state_dict().items() if ".lora_" in name}
        theirs = tune_to_peft_adapter_weights(state, num_heads=4, num_kv_heads=2, dim=32)
        ours = adapter_to_hf(state, config)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours) == (family == "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 4}, "r 3, the model 4"),
        ({"lora_alpha": 8}, "lora_alpha 7, the model 8"),
        ({"apply_lora_to_mlp": False}, "target_modules"),
    ],
)
def test_an_adapter_with_other_options_is_refused(tmp_path, change, message):
    config = write_model(tmp_path, tie_word_embeddings=False)
    lora = trained(tmp_path)
    write_adapter(tmp_path, lora.state_dict(), config, adapter_config(lora))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        read_adapter(tmp_path, config)
    base = tmp_path / "base"
    write_model(base, tie_word_embeddings=False)
    (tmp_path / "adapter_model.bin").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lora_decoder(base, **(EVERYTHING | change), adapter_dir=tmp_path)
    write_model(base, tie_word_embeddings=False, num_hidden_layers=3)
    with pytest.raises(ValueError, match="belongs to another model"):
        load_lora_decoder(base, **EVERYTHING, adapter_dir=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(lora) | {"use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora True, which is not supported"):
        load_lora_decoder(base, **EVERYTHING, adapter_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_attn_modules": ["q"]}, "choose from q_proj"),
        ({"lora_attn_modules": []}, "there would be no adapters"),
        ({"lora_rank": 0}, "there would be no adapters"),
        ({"apply_lora_to_output": True}, "tied to the embeddings"),
        ({"quantize_base": True}, r"layers.0.attn.q_proj.weight .* is \[32, 32\]; set quantize_base to false"),
    ],
)
def test_what_cannot_be_adapted_is_named(tmp_path, options, message):
    write_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_lora_decoder(tmp_path, **options)


QUANTIZABLE = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantized_base_computes_with_what_its_four_bits_say(tmp_path, family):
    """Against a plain decoder whose matrices went through 4 bits, at a quarter to an eighth of the size."""
    write_model(tmp_path, family=family, **QUANTIZABLE)
    lora = load_lora_decoder(tmp_path, quantize_base=True)
    plain = load_decoder(tmp_path)
    matrices = [f"layers.{layer}.{name}.weight" for layer in range(2) for name in MATRICES]
    for name in matrices:
        parameter = plain.get_parameter(name)
        parameter.data.copy_(to_nf4(parameter.data).get_original_weight())
    assert len(quantized_parameters(lora)) == len(matrices)
    torch.testing.assert_close(lora(TOKENS), plain(TOKENS), **CLOSE)

    with deferred_weights():
        later = load_lora_decoder(tmp_path, quantize_base=True)
    assert all(parameter.is_meta for parameter in later.parameters())
    assert len(quantized_parameters(later)) == len(matrices)
    materialize(later, "cpu")
    assert torch.equal(later(TOKENS), lora(TOKENS))

    batch = tiny_batch()
    Policy(lora)(batch, tiny_rollouts(batch), temperature=0.7).rollout.sum().backward()
    gradients = {name: p.grad for name, p in lora.named_parameters() if p.grad is not None}
    assert {name.rpartition(".lora_")[2] for name in gradients} == {"a.weight", "b.weight"}
    assert all(value.abs().sum() > 0 for name, value in gradients.items() if "lora_b" in name)


MATRICES = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3")
