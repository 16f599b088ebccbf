"""Bytes that weights take on one rank, by formula, for each kind of policy and feature network.

    python -m benchmarks.sizes --ranks 1 8 16

Counted are a policy's weights, gradients and AdamW state, and the feature network: what is there all the time. With ``P``
parameters, ``M`` of them in the matrices of attention and MLPs, ``T`` in adapters besides, ``W`` ranks to shard over, and
``P'`` and ``M'`` up to the deepest tap:

    full     16 P / W                       float32 weights, gradients and two moments
    lora     (2 P + 16 T) / W               a bfloat16 base, float32 adapters with gradients and moments
    qlora    q M + (2 (P - M) + 16 T) / W   the matrices in 4 bits, whole on every rank
    phi      4 P', 2 P'                     in fp32, in bf16; sharded 2 P' / W; without adapters 0
    phi      M' + 2 (P' - M')               int8; nf4 likewise with q M'

where ``q = 1/2 + 1/64 + 4/16384`` bytes are a number in NF4 with its scales; int8's scale per row is left out. Not
counted is what comes and goes: activations, the weights gathered for a layer in the compute dtype (and those of embeddings
and head, for as long as the policy is in use), and the cache of rollouts.
"""

import argparse
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from components.estimate import GIB, NF4
from components.models import KNOWN, build_decoder

PolicyKind = Literal["full", "lora", "qlora"]
PhiKind = Literal["fp32", "bf16", "sharded bf16", "int8", "nf4", "adapter_free"]
POLICIES: tuple[PolicyKind, ...] = ("full", "lora", "qlora")
PHIS: tuple[PhiKind, ...] = ("fp32", "bf16", "sharded bf16", "int8", "nf4", "adapter_free")

MODELS = {size: KNOWN[f"Qwen2.5-{size}"] for size in ("1.5B", "7B", "32B")}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of a model; counted on the decoder itself, without memory.

    Attributes:
        parameters: all, ``P``.
        matrices: those of the linear layers of attention and MLPs, ``M``.
        adapters: of rank 8 on the q and v projections, ``T`` of a LoRA policy.
        phi_parameters: up to layer three quarters of the depth, ``P'``.
        phi_matrices: among these, ``M'``.
    """

    parameters: int
    matrices: int
    adapters: int
    phi_parameters: int
    phi_matrices: int


def sizes_of(config: dict[str, Any], *, lora_rank: int = 8) -> Sizes:
    """Count the decoder of a Hugging Face ``config``."""
    with torch.device("meta"):
        decoder = build_decoder(config)
    adapters = sum(
        lora_rank * (projection.in_features + projection.out_features)
        for layer in decoder.layers
        for projection in (layer.attn.q_proj, layer.attn.v_proj)
    )
    tapped = decoder.layers[: int(0.75 * len(decoder.layers))]
    return Sizes(
        parameters=_count(decoder),
        matrices=_matrices(decoder.layers),
        adapters=adapters,
        phi_parameters=_count(decoder.tok_embeddings) + _count(tapped),
        phi_matrices=_matrices(tapped),
    )


def policy_bytes(sizes: Sizes, kind: PolicyKind, *, ranks: int, base_bytes: int = 2) -> float:
    """Weights, gradients and AdamW state on one rank; ``base_bytes`` per number of a frozen base."""
    P, M, T = sizes.parameters, sizes.matrices, sizes.adapters
    if kind == "full":
        return 16 * P / ranks
    if kind == "lora":
        return (base_bytes * P + 16 * T) / ranks
    return NF4 * M + (base_bytes * (P - M) + 16 * T) / ranks


def phi_bytes(sizes: Sizes, kind: PhiKind, *, ranks: int, rest_bytes: int = 2) -> float:
    """The feature network on one rank; ``rest_bytes`` per number that a quantisation leaves alone."""
    P, M = sizes.phi_parameters, sizes.phi_matrices
    if kind == "adapter_free":
        return 0
    if kind == "sharded bf16":
        return 2 * P / ranks
    if kind in ("int8", "nf4"):
        return (1 if kind == "int8" else NF4) * M + rest_bytes * (P - M)
    return (4 if kind == "fp32" else 2) * P


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _matrices(layers: nn.Module) -> int:
    return sum(part.weight.numel() for part in layers.modules() if isinstance(part, nn.Linear))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 16])
    args = parser.parse_args()
    table = Table(title="GiB on one rank")
    for heading in ("model", "ranks", *POLICIES, *(f"phi {kind}" for kind in PHIS[:-1])):
        table.add_column(heading, justify="right")
    for name, config in MODELS.items():
        sizes = sizes_of(config)
        for ranks in args.ranks:
            policies = [policy_bytes(sizes, kind, ranks=ranks) for kind in POLICIES]
            phis = [phi_bytes(sizes, kind, ranks=ranks) for kind in PHIS[:-1]]
            table.add_row(name, str(ranks), *(f"{value / GIB:.1f}" for value in (*policies, *phis)))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
