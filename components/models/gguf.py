"""From a GGUF file to a Hugging Face checkpoint directory, for llamas with SmolLM's tokenizer.

Every number comes from the file's metadata; quantised weights are dequantised. Not exported by the package: it needs
the library ``gguf``, which only the quickstart installs. Who the file is from and whether the result is right is the
caller's business (``components.prepare``).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from components.models.decoder import parse_dtype

_OUTER_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, checkpoint_dir: Path, dtype: str) -> None:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` and the two files of the tokenizer.

    Args:
        source: a GGUF file of architecture ``llama`` with tied embeddings and tokenizer ``smollm``.
        checkpoint_dir: an existing directory.
        dtype: of the stored weights, ``"float32"`` or ``"bfloat16"``.

    Raises:
        ValueError: a file of another kind.
    """
    reader = GGUFReader(source)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    for key, wanted in {"general.architecture": "llama", "tokenizer.ggml.pre": "smollm"}.items():
        if metadata.get(key) != wanted:
            raise ValueError(f"{key} of {source} is {metadata.get(key)!r}; only files where it is {wanted!r} are read")
    config = _config(metadata, dtype)
    weights = {name: value.to(parse_dtype(dtype)) for name, value in _weights(reader.tensors, config)}
    save_file(weights, checkpoint_dir / "model.safetensors", metadata={"format": "pt"})
    _tokenizer(metadata).save(str(checkpoint_dir / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "generation_config.json": {key: value for key, value in config.items() if key.endswith("_token_id")},
        "tokenizer_config.json": _tokenizer_config(metadata),
    }.items():
        (checkpoint_dir / name).write_text(json.dumps(content, indent=2) + "\n")


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a query or key projection, from llama.cpp's order to Hugging Face's.

    Rope turns the rows of a head in pairs. llama.cpp has the two of a pair side by side, Hugging Face has them half a
    head apart.

    Args:
        weight: ``[num_heads * head_dim, width]``.
        num_heads: heads of this projection; keys may have fewer than queries.
    """
    rows, width = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _weights(tensors: Iterable[ReaderTensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Names of Hugging Face's, and weights in float32."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in tensors:
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        *layer, name, suffix = tensor.name.split(".")  # blk.0.attn_q.weight, token_embd.weight
        if name in heads:
            value = unpermute(value, heads[name])
        inner = f"layers.{layer[1]}.{_LAYER_NAMES[name]}" if layer else _OUTER_NAMES[name]
        yield f"model.{inner}.{suffix}", value


def _config(metadata: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        # Stored as float32: this makes 1e-05 of 9.999999747378752e-06 again.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,  # a file with an output matrix of its own fails in _weights
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    assert tokenizer.get_vocab() == vocab
    return tokenizer


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {key: tokens[metadata[f"tokenizer.ggml.{role}_token_id"]] for key, role in roles.items()}
    return config | {
        "add_bos_token": metadata["tokenizer.ggml.add_bos_token"],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # a llama takes no token types
        "model_max_length": metadata["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
    }
