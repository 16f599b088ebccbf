"""Checkpoints that are not here yet, as far as their shapes go: for looking at a config before the download.

The shapes are those of the ``config.json`` on the Hugging Face hub. A stand-in is a directory that every loader here takes
for a checkpoint; its weights are a hole in a file, which takes no space on disk and must never be read.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from components.models.decoder import build_decoder, to_hf

_FILE_NUMBERS = 10**9  # of a file: opening one asks for as much address space as it has bytes

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_SMOLLM2 = _LLAMA | {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000}
_LLAMA3 = _LLAMA | {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0}
_QWEN2 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_MISTRAL = {"model_type": "mistral", "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def _shape(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **scaling}}


KNOWN: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": _SMOLLM2 | _shape(576, 1536, 30, 9, 3),
    "SmolLM2-360M": _SMOLLM2 | _shape(960, 2560, 32, 15, 5),
    "SmolLM2-1.7B": _SMOLLM2 | _shape(2048, 8192, 24, 32, 32) | {"rope_theta": 130000},
    "Qwen2.5-0.5B": _QWEN2 | _shape(896, 4864, 24, 14, 2),
    "Qwen2.5-1.5B": _QWEN2 | _shape(1536, 8960, 28, 12, 2) | {"max_position_embeddings": 131072},
    "Qwen2.5-3B": _QWEN2 | _shape(2048, 11008, 36, 16, 2),
    "Qwen2.5-7B": _QWEN2 | _shape(3584, 18944, 28, 28, 4) | {"vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen2.5-32B": _QWEN2 | _shape(5120, 27648, 64, 40, 8) | {"vocab_size": 152064, "tie_word_embeddings": False},
    "Llama-3.2-1B": _LLAMA3 | _shape(2048, 8192, 16, 32, 8) | _llama3_rope(32.0),
    "Llama-3.2-3B": _LLAMA3 | _shape(3072, 8192, 28, 24, 8) | _llama3_rope(32.0),
    "Llama-3.1-8B": _LLAMA3 | _shape(4096, 14336, 32, 32, 8) | _llama3_rope(8.0) | {"tie_word_embeddings": False},
    "Mistral-7B-v0.3": _MISTRAL
    | _shape(4096, 14336, 32, 32, 8)
    | {"vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
}


def known_config(checkpoint_dir: str | Path) -> dict[str, Any] | None:
    """The shape of the model that a directory is named after, such as ``Qwen2.5-1.5B-Instruct``; None if unknown."""
    name = Path(checkpoint_dir).name
    longest = max((known for known in KNOWN if name.startswith(known)), key=len, default=None)
    return None if longest is None else KNOWN[longest]


def write_stand_in(directory: Path, config: dict[str, Any]) -> None:
    """Make ``directory`` a checkpoint of ``config`` without weights."""
    with torch.device("meta"):
        weights = to_hf(build_decoder(config).state_dict(), config)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    files: list[dict[str, Any]] = [{}]
    for name, value in weights.items():
        if sum(other.numel() for other in files[-1].values()) + value.numel() > _FILE_NUMBERS:
            files.append({})
        files[-1][name] = value
    places = {name: f"model-{number:05}.safetensors" for number, part in enumerate(files) for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    for number, part in enumerate(files):
        _write_hole(directory / f"model-{number:05}.safetensors", part)


def _write_hole(path: Path, weights: dict[str, torch.Tensor]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, value in weights.items():
        start, end = end, end + 2 * value.numel()
        header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
