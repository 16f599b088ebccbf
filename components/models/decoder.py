"""A torchtune decoder for a Hugging Face ``config.json``, and names and layouts of weights there and back.

The families are those whose torchtune builder computes what their ``config.json`` says: llama (1 to 3.2, SmolLM2), qwen2
(and 2.5), mistral. Anything a builder would silently ignore (rope scaling of another kind, attention biases, another
activation) is refused here by name.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.models.mistral._component_builders import mistral
from torchtune.models.qwen2._component_builders import qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf
from torchtune.modules import TransformerDecoder

from components.blocks import AttentionPattern, PackedAttention, PackedLayout
from components.types import Batch, Rollouts

_FAMILIES = ("llama", "mistral", "qwen2")
_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """``"fp32"`` or ``"bf16"`` (or the torch dtype itself) as a torch dtype.

    Raises:
        ValueError: any other dtype.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; choose 'fp32' or 'bf16'")
        return _DTYPES[dtype]
    return dtype


def read_config(checkpoint_dir: str | Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face checkpoint.

    Raises:
        ValueError: no such directory, no ``config.json`` in it, or one that is not JSON.
    """
    path = Path(checkpoint_dir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"no config.json in checkpoint_dir '{checkpoint_dir}'; it should be a Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer.json), as `tune download` or `python -m components.prepare` makes"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download the checkpoint again") from error


def build_decoder(config: Mapping[str, Any], *, max_seq_len: int | None = None) -> TransformerDecoder:
    """An uninitialised torchtune decoder for a Hugging Face ``config``, on the current default device and dtype.

    Args:
        config: contents of ``config.json``.
        max_seq_len: length of the rope cache; the model's own limit by default. A mistral with a sliding window is
            limited to that window, since nothing here slides.

    Raises:
        ValueError: a family or a setting that torchtune's builders do not compute.
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"model_type {family!r} in config.json is not supported; choose one of {', '.join(_FAMILIES)}")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    refused = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "head_dim": (config.get("head_dim") or width // heads) != width // heads,
        "attention_bias": bool(config.get("attention_bias")) and family != "qwen2",
        "mlp_bias": bool(config.get("mlp_bias")),
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "rope_scaling": _rope_type(config) not in (("default", "llama3") if family == "llama" else ("default",)),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")) and family == "mistral",
    }
    for key, refuse in refused.items():
        if refuse:
            raise ValueError(
                f"{key} {config[key]!r} in config.json is not supported for model_type {family!r}; "
                "use a checkpoint without it"
            )
    limit = config["max_position_embeddings"]
    if family == "mistral" and config.get("sliding_window"):
        limit = min(limit, config["sliding_window"])
    shape = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "embed_dim": width,
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": min(max_seq_len, limit) if max_seq_len else limit,
        "norm_eps": config["rms_norm_eps"],
        "rope_base": int(config.get("rope_theta", 10_000)),
    }
    if family == "mistral":
        return mistral(**shape)
    tied = bool(config.get("tie_word_embeddings", False))
    if family == "qwen2":
        return qwen2(**shape, tie_word_embeddings=tied)
    decoder = llama3_2(**shape, scale_factor=1, tie_word_embeddings=tied)
    if _rope_type(config) == "llama3":
        _scale_rope(decoder, config["rope_scaling"])
    return decoder


def _rope_type(config: Mapping[str, Any]) -> str:
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def _scale_rope(decoder: TransformerDecoder, scaling: Mapping[str, Any]) -> None:
    plain = decoder.layers[0].attn.pos_embeddings
    scaled = Llama3ScaledRoPE(
        dim=plain.dim,
        max_seq_len=plain.max_seq_len,
        base=plain.base,
        scale_factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        old_context_len=scaling["original_max_position_embeddings"],
    )
    for layer in decoder.layers:
        layer.attn.pos_embeddings = scaled


def from_hf(weights: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by torchtune's names, from weights by Hugging Face's."""
    if config.get("tie_word_embeddings"):
        weights = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    return _convert(weights, config, hf_to_tune, qwen2_hf_to_tune)


def to_hf(weights: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, from weights by torchtune's: what :func:`load_decoder` and transformers read."""
    converted = _convert(weights, config, tune_to_hf, qwen2_tune_to_hf)
    return {name: value.contiguous() for name, value in converted.items()}


def _convert(weights: dict[str, Tensor], config: Mapping[str, Any], plain: Any, qwen: Any) -> dict[str, Tensor]:
    heads = config["num_attention_heads"]
    shape = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config["hidden_size"] // heads,
        "dim": -1,  # columns of a q or k matrix, whose rows are permuted: as many as it has (an adapter's B has its rank)
    }
    try:
        if config["model_type"] == "qwen2":
            return qwen(weights, **shape, tie_word_embeddings=bool(config.get("tie_word_embeddings")))
        return plain(weights, **shape)
    except Exception as error:
        raise ValueError(f"weights do not belong to a {config['model_type']} checkpoint ({error})") from error


def hidden_states(
    decoder: TransformerDecoder, tokens: Tensor, positions: Tensor, pattern: AttentionPattern, taps: tuple[int, ...]
) -> list[Tensor]:
    """Hidden states after the blocks numbered ``taps`` (1 is the first; 0 the embeddings), each ``[B, S, width]``.

    Args:
        decoder: prepared by ``components.blocks.install``; its norm and head are not used.
        tokens: ``[B, S]`` long.
        positions: ``[B, S]`` long, for rope.
        pattern: who sees whom.
        taps: ascending; layers past the last are not run.
    """
    h = decoder.tok_embeddings(tokens)
    states = [h] if 0 in taps else []
    for depth, layer in enumerate(decoder.layers[: taps[-1]], start=1):
        h = layer(h, mask=pattern, input_pos=positions)
        if depth in taps:
            states.append(h)
    return states


def read_packed(
    decoder: TransformerDecoder, batch: Batch, rollouts: Rollouts, taps: tuple[int, ...]
) -> tuple[PackedLayout, list[Tensor]]:
    """:func:`hidden_states` of ground truth and rollouts in one packed forward, and the layout of the sequence."""
    _, n, _, G = rollouts.tokens.shape
    layout = PackedLayout(doc_ids=batch.doc_ids, anchors=rollouts.anchors, num_samples=n, block_len=G)
    tokens = layout.pack(batch.tokens, rollouts.tokens)
    return layout, hidden_states(decoder, tokens, layout.positions(), PackedAttention(layout), taps)
