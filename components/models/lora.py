"""Low-rank adapters on a frozen base, in float or 4 bits (LoRA, QLoRA), and their files in PEFT's format.

A LoRA decoder is the decoder of ``build_decoder`` with some linear layers replaced; the names of its base weights stay. The
functions on state dicts are pure and take whole weights by torchtune's names: what a checkpointer has gathered.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.models.convert_weights import tune_to_peft_adapter_config
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.peft import LORA_ATTN_MODULES, LoRALinear, disable_adapter

from components.models.decoder import build_decoder, from_hf, parse_dtype, read_config, to_hf
from components.models.loading import CheckpointWeights, fill

# Numbers that NF4 quantises as one: 64 share a scale, and 256 scales share one of their own.
_NF4_BLOCK = 64 * 256
_PEFT_PREFIX = "base_model.model."
# What PEFT's file may say that would change what the same weights compute.
_UNSUPPORTED = ("alpha_pattern", "fan_in_fan_out", "rank_pattern", "use_dora", "use_rslora")
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")

adapters_disabled = disable_adapter  # with adapters_disabled(decoder): the base model


class _MixedLoRALinear(LoRALinear):
    """torchtune's, with adapters and base of different dtypes: all computed in the input's, as PEFT does."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if isinstance(self.weight, NF4Tensor) else self.weight.to(x.dtype)
        out = F.linear(x, weight, self.bias)
        if self.disabled:
            return out
        a, b = self.lora_a.weight.to(x.dtype), self.lora_b.weight.to(x.dtype)
        return out + self.alpha / self.rank * F.linear(F.linear(self.dropout(x), a), b)


class _LoRAWeights(CheckpointWeights):
    """Base weights from a checkpoint, quantised where asked for; adapters from ``saved``, or initialised."""

    def __init__(
        self,
        checkpoint_dir: str | Path,
        config: dict[str, Any],
        *,
        adapters: Mapping[str, torch.Size],
        saved: Mapping[str, Tensor],
        quantized: Collection[str],
    ) -> None:
        super().__init__(checkpoint_dir, config)
        self.shapes |= adapters
        self.saved = saved
        self.quantized = quantized

    def read(self, name: str, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        if name in self.saved:
            return self.saved[name].to(device, dtype, copy=True)
        if name.endswith(".lora_b.weight"):
            return torch.zeros(self.shapes[name], device=device, dtype=dtype)
        if name.endswith(".lora_a.weight"):
            # Drawn whole and on the CPU, so that it depends on the seed alone: on no rank, number of ranks or device.
            return nn.init.kaiming_uniform_(torch.empty(self.shapes[name], device="cpu"), a=math.sqrt(5)).to(
                device, dtype
            )
        value = super().read(name, device=device, dtype=dtype)
        return to_nf4(value) if name in self.quantized else value


def load_lora_decoder(
    checkpoint_dir: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    lora_attn_modules: Sequence[LORA_ATTN_MODULES] = ("q_proj", "v_proj"),
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    quantize_base: bool = False,
    adapter_dir: str | Path | None = None,
    max_seq_len: int | None = None,
) -> TransformerDecoder:
    """The decoder of a Hugging Face directory, frozen, with trainable adapters; options by torchtune's names.

    Adapters are float32. They start as nothing (B is zero; A is drawn from torch's global generator), or as saved. Weights may
    be deferred as with :func:`components.models.load_decoder`.

    Args:
        checkpoint_dir: llama, qwen2 or mistral.
        dtype: of the base weights. They do not move, so bfloat16 costs only its rounding.
        lora_attn_modules: which projections of attention get an adapter.
        apply_lora_to_mlp: whether the MLPs' matrices get one.
        apply_lora_to_output: whether the head gets one; not if it is tied to the embeddings.
        lora_rank: rank of the adapters.
        lora_alpha: ``lora_alpha / lora_rank`` scales them.
        lora_dropout: on the adapters' input while the decoder is in training mode, rollouts included: above 0, sampling
            and scoring differ.
        quantize_base: hold the matrices of attention and MLPs in 4 bits (QLoRA). They are not sharded: each rank holds them.
        adapter_dir: a PEFT directory with adapters of these options.
        max_seq_len: see :func:`components.models.build_decoder`.

    Raises:
        ValueError: a missing, damaged or unsupported checkpoint, options that adapt nothing or are not the saved adapters', or
            a matrix that NF4 cannot hold.
    """
    config = read_config(checkpoint_dir)
    if unknown := set(lora_attn_modules) - set(get_args(LORA_ATTN_MODULES)):
        raise ValueError(
            f"lora_attn_modules has {sorted(unknown)}; choose from {', '.join(get_args(LORA_ATTN_MODULES))}"
        )
    if not lora_alpha > 0:
        raise ValueError(f"lora_alpha is {lora_alpha}; it scales the adapters and must be above 0")
    if not (lora_attn_modules or apply_lora_to_mlp or apply_lora_to_output) or lora_rank < 1:
        raise ValueError("there would be no adapters; name lora_attn_modules and set lora_rank to at least 1")
    targets = {*lora_attn_modules, *(("w1", "w2", "w3") if apply_lora_to_mlp else ())}
    with torch.device("meta"):
        decoder = build_decoder(config, max_seq_len=max_seq_len).to(parse_dtype(dtype)).requires_grad_(False)
        if apply_lora_to_output and isinstance(decoder.output, TiedLinear):
            raise ValueError("apply_lora_to_output is true, but the head is tied to the embeddings; set it to false")
        inside = [name for name, part in decoder.layers.named_modules(prefix="layers") if isinstance(part, nn.Linear)]
        chosen = [name for name in inside if name.rpartition(".")[2] in targets]
        for name in chosen + ["output"] * apply_lora_to_output:
            base = decoder.get_submodule(name)
            adapted = _MixedLoRALinear(
                base.in_features,
                base.out_features,
                rank=lora_rank,
                alpha=lora_alpha,
                dropout=lora_dropout,
                use_bias=base.bias is not None,
            )
            adapted.weight, adapted.bias = base.weight, base.bias
            decoder.set_submodule(name, adapted)
    quantized = [f"{name}.weight" for name in inside] if quantize_base else []
    shapes = {name: value.shape for name, value in decoder.state_dict().items()}
    for name in quantized:
        if shapes[name].numel() % _NF4_BLOCK:
            raise ValueError(
                f"quantize_base: 4 bits hold whole blocks of {_NF4_BLOCK} numbers, and {name} of '{checkpoint_dir}' is "
                f"{list(shapes[name])}; set quantize_base to false and dtype to bf16"
            )
    adapters = {name: shape for name, shape in shapes.items() if _is_adapter(name)}
    saved = {}
    if adapter_dir is not None:
        saved = read_adapter(adapter_dir, config, adapter_config(decoder))
        if {name: value.shape for name, value in saved.items()} != adapters:
            raise ValueError(
                f"adapter_dir '{adapter_dir}' belongs to another model than '{checkpoint_dir}'; name its own"
            )
    weights = _LoRAWeights(checkpoint_dir, config, adapters=adapters, saved=saved, quantized=quantized)
    return fill(decoder, weights, checkpoint_dir)


def has_adapters(module: nn.Module) -> bool:
    """Whether anything in ``module`` has an adapter."""
    return any(isinstance(part, LoRALinear) for part in module.modules())


def quantized_parameters(module: nn.Module) -> set[nn.Parameter]:
    """The 4-bit parameters in ``module``, deferred ones too: what ``fully_shard`` is to leave alone (``ignored_params``).

    FSDP2 cannot gather NF4 on one process, and on several torchao quantises each shard's scales anew, so that ranks differ.
    """
    decoders = [part for part in module.modules() if isinstance(getattr(part, "weights", None), _LoRAWeights)]
    return {
        parameter
        for decoder in decoders
        for name, parameter in decoder.state_dict(keep_vars=True).items()
        if name in decoder.weights.quantized  # type: ignore[union-attr, operator]
    }


def adapter_config(decoder: nn.Module, base_model: str | Path | None = None) -> dict[str, Any]:
    """``adapter_config.json`` of a decoder's adapters, as PEFT reads it; ``base_model`` is the directory they belong to."""
    adapted = {name: part for name, part in decoder.named_modules() if isinstance(part, LoRALinear)}
    first = next(iter(adapted.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": getattr(first.dropout, "p", 0.0),
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
        "bias": "none",
    }
    return tune_to_peft_adapter_config(config, base_model and str(base_model))


def adapter_to_hf(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The adapters among a decoder's ``weights``, by PEFT's names and in Hugging Face's order of rows.

    Not torchtune's ``tune_to_peft_adapter_weights``, which permutes the rows of every family: those of qwen2 are in order.
    """
    converted: dict[str, Tensor] = {}
    for name in [name for name in weights if name.endswith(".lora_b.weight")]:
        module = name.removesuffix(".lora_b.weight")
        ((hf_name, b),) = to_hf({f"{module}.weight": weights[name]}, config).items()
        hf_module = _PEFT_PREFIX + hf_name.removesuffix(".weight")
        converted[f"{hf_module}.lora_A.weight"] = weights[f"{module}.lora_a.weight"].contiguous()
        converted[f"{hf_module}.lora_B.weight"] = b
    return converted


def adapter_from_hf(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of :func:`adapter_to_hf`.

    Raises:
        ValueError: names that are not those of a LoRA adapter of the family.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        hf_module, dot, kind = name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        if not name.startswith(_PEFT_PREFIX) or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{name} is no weight of a LoRA adapter; give a directory that PEFT or this project saved")
        # Only B has rows to reorder. A goes along for its name.
        stub = value if kind == "B.weight" else weights[name.replace(".lora_A.", ".lora_B.")]
        ((our_name, rows),) = from_hf({f"{hf_module}.weight": stub}, config).items()
        our_module = our_name.removesuffix(".weight")
        converted[f"{our_module}.lora_{kind.lower()}"] = rows if kind == "B.weight" else value
    return converted


def merge_adapters(
    weights: Mapping[str, Tensor], lora_alpha: float, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The plain decoder's weights that compute the same: ``W + lora_alpha / rank * B @ A``, rounded once.

    Args:
        weights: base and adapters by torchtune's names. After training in 4 bits, take the base from its checkpoint.
        lora_alpha: as in :func:`load_lora_decoder`.
        dtype: of the merged matrices, by default that of their base; the others stay as they are.
    """
    merged = {name: value for name, value in weights.items() if not _is_adapter(name)}
    for name in [name for name in weights if name.endswith(".lora_a.weight")]:
        module, a = name.removesuffix(".lora_a.weight"), weights[name].float()
        base = merged[f"{module}.weight"]
        update = lora_alpha / len(a) * (weights[f"{module}.lora_b.weight"].float() @ a)
        merged[f"{module}.weight"] = (base.float() + update).to(dtype or base.dtype)
    return merged


def write_adapter(
    directory: str | Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], adapter: Mapping[str, Any]
) -> None:
    """Save the adapters among ``weights`` as a directory that PEFT loads onto the Hugging Face model.

    Args:
        directory: exists.
        weights: by torchtune's names; base weights are left out.
        config: the base model's ``config.json``.
        adapter: from :func:`adapter_config`.
    """
    weights_file, config_file = (Path(directory) / name for name in _ADAPTER_FILES)
    save_file(adapter_to_hf(weights, config), weights_file, metadata={"format": "pt"})
    config_file.write_text(json.dumps(adapter, indent=2) + "\n")


def read_adapter(
    directory: str | Path, config: Mapping[str, Any], adapter: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Adapters of a PEFT directory, by torchtune's names.

    Args:
        directory: with ``adapter_model.safetensors`` and ``adapter_config.json``.
        config: the base model's ``config.json``.
        adapter: the :func:`adapter_config` of the decoder they are for; what decides what they compute must be equal.

    Raises:
        ValueError: missing or damaged files, or adapters of another kind.
    """
    weights_file, config_file = (Path(directory) / name for name in _ADAPTER_FILES)
    try:
        weights, saved = load_file(weights_file), json.loads(config_file.read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"adapter directory '{directory}' cannot be read ({error}); give one with {' and '.join(_ADAPTER_FILES)}"
        ) from error
    for key in _UNSUPPORTED:
        if saved.get(key):
            raise ValueError(f"{config_file} has {key} {saved[key]}, which is not supported; give a plain LoRA adapter")
    wanted = adapter or saved
    for key in ("r", "lora_alpha", "target_modules"):
        one, other = (sorted(value) if isinstance(value, list) else value for value in (saved.get(key), wanted[key]))
        if one != other:
            raise ValueError(
                f"{config_file} has {key} {one}, the model {other}; set the model's lora options to the file's"
            )
    return adapter_from_hf(weights, config)


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_a.weight", ".lora_b.weight"))
