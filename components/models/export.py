"""The way back: trained weights as a Hugging Face model directory, beside the files of the checkpoint they started from."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models.decoder import build_decoder, from_hf, read_config, to_hf
from components.models.loading import read_weights
from components.models.lora import merge_adapters

# What makes a directory of weights a model: everything of the base checkpoint that is small and not weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


def write_model(
    directory: Path,
    weights: dict[str, Tensor],
    checkpoint_dir: str | Path,
    *,
    dtype: torch.dtype,
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """The files that transformers reads.

    Args:
        directory: exists.
        weights: all that was trained, whole, by torchtune's names; what is not among them is as in ``checkpoint_dir``.
        checkpoint_dir: the Hugging Face directory that training started from; configuration and tokenizer are copied.
        dtype: of the weights in the file.
        adapter: the ``adapter_config`` of adapters among ``weights``, which are added to their base.
    """
    config = read_config(checkpoint_dir)
    for pattern in _COMPANIONS:
        for file in Path(checkpoint_dir).glob(pattern):
            if not file.name.endswith(".index.json"):
                shutil.copyfile(file, directory / file.name)
    written = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    with torch.device("meta"):
        names = build_decoder(config).state_dict().keys()
    if names - weights.keys():
        weights = from_hf(read_weights(checkpoint_dir), config) | weights
    if adapter is not None:
        weights = merge_adapters(weights, adapter["lora_alpha"], dtype=dtype)
    named = {name: value.to(dtype) for name, value in weights.items()}
    save_file(to_hf(named, config), directory / "model.safetensors", metadata={"format": "pt"})
