"""Fewer bits for the matrices of a network that never trains, by any of torchao's configs for weights."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.dtypes._nf4tensor_api import _nf4_weight_only_transform
from torchao.quantization import quantize_
from torchao.quantization.transform_module import register_quantize_module_handler
from torchtune.modules import TransformerDecoder


@dataclass
class NF4WeightOnlyConfig(AOBaseConfig):
    """4 bits a weight, normal-float (QLoRA's): torchao's config of this name, which takes no options.

    Args:
        block_size: numbers that share a scale.
        scaler_block_size: scales that share one of their own. Its product with ``block_size`` must divide every matrix:
            256 fits widths that are multiples of 128, 64 fits SmolLM2's 576.
    """

    block_size: int = 64
    scaler_block_size: int = 256


register_quantize_module_handler(NF4WeightOnlyConfig)(_nf4_weight_only_transform)


def quantize(decoder: TransformerDecoder, config: AOBaseConfig) -> None:
    """Quantise the linear layers of ``decoder.layers``, in place. Deferred weights follow one by one, as they are read.

    Raises:
        ValueError: now or when weights are read; something that is no config, or one that does not fit a matrix or the device.
    """
    if not isinstance(config, AOBaseConfig):
        raise ValueError(
            f"quantization is {config!r}; name a config, such as {{_component_: torchao.quantization.Int8WeightOnlyConfig}}"
        )
    for name, part in decoder.layers.named_modules(prefix="layers"):
        if not isinstance(part, nn.Linear):
            continue
        weight = f"{name}.weight"
        if part.weight.is_meta:
            decoder.weights.converted[weight] = functools.partial(_quantized, name=weight, config=config)
        else:
            part.weight = nn.Parameter(_quantized(part.weight, weight, config), requires_grad=False)


@torch.no_grad()
def _quantized(value: Tensor, name: str, config: AOBaseConfig) -> Tensor:
    """``value`` ``[out, in]`` as ``config`` holds it, having computed once: kernels for the device may be missing."""
    linear = nn.Linear(value.shape[1], value.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(value.detach(), requires_grad=False)
    try:
        quantize_(linear, config)
        linear(value.new_zeros(1, value.shape[1]))
    except Exception as error:
        raise ValueError(
            f"quantization: {config} cannot hold {name} {list(value.shape)} {value.dtype} on {value.device} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); choose another config, or remove it"
        ) from error
    if type(linear.weight) is nn.Parameter:
        raise ValueError(f"quantization: {config} leaves {name} {list(value.shape)} as it is; choose another config")
    return linear.weight.detach()
