"""Bytes that a run takes on one rank, from its policy and feature network as they stand on the meta device, and formulas for
what comes and goes (``docs/performance.md``). Within 15% of what was measured on a CPU; never compared with a GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from components.estimate.flops import Step
from components.models import KEPT_ELEMENTS, Policy, quantized_parameters

GIB = 2**30
NF4 = 1 / 2 + 1 / 64 + 4 / 16384  # bytes a number, with its scales
_LIBRARIES = 0.65 * GIB  # Python, torch and torchtune before anything is loaded, and what the allocator holds back
_LOGITS = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        held: what is there all the time, by what holds it.
        phases: what comes and goes besides, by phase and by what it is; phases follow one another.
        offloaded: what waits in the memory of the CPU, by what it is; no part of the peak.
    """

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    offloaded: dict[str, float]

    @property
    def peak(self) -> float:
        """The most that is there at once."""
        return sum(self.held.values()) + max(sum(parts.values()) for parts in self.phases.values())


def held_bytes(values: Iterable[Tensor | None]) -> int:
    """What tensors take on this rank: of a shard its part, of torchao's tensors what they are made of."""
    total = 0
    for value in values:
        if isinstance(value, DTensor):
            value = value.to_local()
        if value is not None and is_traceable_wrapper_subclass(value):
            names: list[str] = value.__tensor_flatten__()[0]
            total += held_bytes(getattr(value, name) for name in names)
        elif value is not None:
            total += value.numel() * value.element_size()
    return total


def estimate_memory(
    policy: Policy,
    *,
    step: Step,
    dtype: torch.dtype,
    network: nn.Module | None = None,
    reference: nn.Module | None = None,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW,
    ranks: int = 1,
    replicate: int = 1,
    shard_network: bool = False,
    cpu_offload: bool = False,
    activation_checkpointing: bool = False,
    whole_gradients: bool = False,
    asynchronous_saving: bool = False,
) -> Memory:
    """Memory of one rank while it trains.

    Args:
        policy: on the meta device.
        step: of a micro-batch on one rank.
        dtype: of the computation.
        network: the feature network with weights of its own, on the meta device; None for one that has none.
        reference: of a KL term, likewise.
        make_optimizer: tried on a small parameter, to see what it keeps for a number.
        ranks: processes.
        replicate: copies of the weights; ``ranks / replicate`` processes share one.
        shard_network: whether they share the network's too.
        cpu_offload: weights, gradients and optimizer wait in CPU memory; to be given for a GPU alone, since on a CPU it is
            where they are anyway.
        activation_checkpointing: of the policy.
        whole_gradients: gradient accumulation that reduces over ranks once a step.
        asynchronous_saving: a copy of what is saved waits in CPU memory (counted on a CPU alone).

    Raises:
        ValueError: ``replicate`` does not divide ``ranks``.
    """
    if ranks % replicate:
        raise ValueError(
            f"data_parallel_replicate is {replicate}, which does not divide {ranks} processes; choose a divisor"
        )
    world, ranks = ranks, ranks // replicate
    e, decoder = dtype.itemsize, policy.decoder
    quantized = quantized_parameters(policy)
    weights = sum(
        NF4 * p.numel() if p in quantized else p.numel() * p.element_size() / ranks for p in policy.parameters()
    )
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad) / ranks
    optimizer = trained * _optimizer_bytes(make_optimizer)
    phi = 0.0 if network is None else _network_bytes(network) / (world // replicate if shard_network else 1)

    attention = decoder.layers[0].attn
    depth, width, vocabulary = len(decoder.layers), attention.embed_dim, decoder.tok_embeddings.num_embeddings
    mlp = len(decoder.layers[0].mlp.w1.weight)
    tokens = step.sequences * step.packed_tokens
    layer = tokens * (11 * width + 4 * mlp) * e
    kept = depth * (tokens * width * e if activation_checkpointing else layer)
    # A layer forward, again in the backward, and its gradients; logits, what is kept of them; the head's gradient.
    rows = step.sequences * (step.length + len(step.anchors) * (1 + step.samples * (step.rollout_len - 1)))
    # Measured with activation checkpointing: twice as many layers' worth, of which the heap holds some back.
    passing = (6 if activation_checkpointing else 3) * layer
    logits = 3 * _LOGITS + 4 * min(KEPT_ELEMENTS, rows * vocabulary)
    if any(p.requires_grad and p.shape == (vocabulary, width) for p in policy.parameters()):
        logits += 4 * vocabulary * width
    cache = 2 * depth * attention.num_kv_heads * attention.head_dim * tokens * e
    numbers = sum(p.numel() for p in policy.parameters() if p not in quantized)
    # Weights gathered or cast: all of them in a rollout, two layers and the embeddings in a forward with a backward.
    cast = any(p.dtype != dtype for p in policy.parameters() if p not in quantized)
    spread = ranks > 1 or cast or cpu_offload
    gathered = numbers * e if spread else 0
    around = (vocabulary * width + 2 * (numbers - vocabulary * width) / depth) * e if spread else 0
    read = tokens + step.sequences * step.samples * len(step.anchors)
    gradients = 4 * trained
    phases = {
        "rollouts": {"weights, gathered": gathered, "key/value cache": cache, "logits": _LOGITS},
        "features": {"activations": read * (8 * width + 3 * mlp) * e},
        "update": {
            "weights, gathered": around,
            "gradients": gradients,
            "activations": kept + passing,
            "logits and the head's gradient": logits,
        },
    }
    if asynchronous_saving:  # the copy that is written waits beside the steps
        phases["update"]["a copy that is saved"] = weights + optimizer
        phases["saving"] = {"a copy that is saved": weights + optimizer, "weights, gathered": 2 * 4 * numbers}
    held = {"libraries": _LIBRARIES, "weights": weights, "optimizer": optimizer, "feature network": phi}
    if reference is not None:
        held["reference"] = held_bytes(reference.parameters())
    if whole_gradients and world > 1:
        held["whole gradients"] = gradients * ranks
    offloaded = {}
    if cpu_offload:
        offloaded = {name: held.pop(name) for name in ("weights", "optimizer")}
        offloaded["gradients"] = phases["update"].pop("gradients")
    return Memory(held=held, phases=phases, offloaded=offloaded)


def _optimizer_bytes(make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of state for one trained number."""
    sample = nn.Parameter(torch.zeros(64, 1024))
    optimizer = make_optimizer([sample])
    sample.grad = torch.zeros_like(sample)
    optimizer.step()
    state = (value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor))
    return held_bytes(value for value in state if value.numel() > 1) / sample.numel()


def _network_bytes(network: nn.Module) -> float:
    """What the weights of a feature network will take once they are read and, if so configured, quantised."""
    converted: dict[str, Callable[[Tensor], Tensor]] = {}
    for part in network.modules():
        converted |= getattr(getattr(part, "weights", None), "converted", {})
    named = {name.removeprefix("decoder."): p for name, p in network.named_parameters()}
    sample = next((name for name in converted if name in named), None)
    share = 0.0  # bytes a number, of those that are converted
    if sample is not None:
        matrix = torch.zeros(named[sample].shape, dtype=named[sample].dtype)
        share = held_bytes([converted[sample](matrix)]) / matrix.numel()
    return sum(p.numel() * (share if name in converted else p.element_size()) for name, p in named.items())
