"""One process or many: the process group, FSDP2 sharding of the policy, sums over ranks.

There is one code path: a single process is a group of one. FSDP also gives every size the same mixed precision: weights,
gradients and optimizer state in float32, a copy in the compute dtype for each pass.
"""

import os
import random
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import set_activation_checkpointing

from components.models import Policy, materialize, parse_dtype, quantized_parameters
from components.training import watchdog


def start(device: str, *, timeout_minutes: float = 30) -> torch.device:
    """Join the process group that torchrun (``tune run --nproc_per_node N``) describes, or one of a single process.

    Args:
        device: ``"cpu"`` or ``"cuda"``; each rank takes the CUDA device of its ``LOCAL_RANK``.
        timeout_minutes: how long a rank may make no progress before the run ends (``components.training.watchdog``).

    Raises:
        ValueError: a device that is not there.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; choose 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but torch sees no CUDA device; set device=cpu or install a CUDA build of torch"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no CUDA device, there are {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if not dist.is_initialized():
        # The backend gives up after the watchdog, which knows more.
        timeout = timedelta(minutes=timeout_minutes + 1)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            watchdog.watch(store, rank=rank, world_size=world_size, timeout_minutes=timeout_minutes)
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def stop() -> None:
    """Leave the process group."""
    watchdog.unwatch()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed: int) -> torch.Generator:
    """Seed the global generators, and give the generator of rollouts: alike on all ranks, see ``components.rollouts``."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def rng_state(rollouts: torch.Generator) -> dict[str, Any]:
    """Where all that :func:`seed_everything` seeded stands on this rank, as ``torch.load(weights_only=True)`` reads it."""
    kind, keys, *rest = np.random.get_state()
    return {
        "rollouts": rollouts.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def set_rng_state(rollouts: torch.Generator, state: dict[str, Any]) -> None:
    """Go on where ``state`` was taken."""
    rollouts.set_state(state["rollouts"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def shard(
    policy: Policy,
    device: torch.device,
    *,
    dtype: str,
    activation_checkpointing: bool,
    compile: bool,
    cpu_offload: bool = False,
    data_parallel_replicate: int = 1,
) -> None:
    """Prepare ``policy`` for training, in place: checkpointing, compilation, FSDP2 (in this order), deferred weights.

    Args:
        policy: on any device, weights in the dtype that is trained (float32, or bfloat16 to save memory). Deferred
            ones are read here (``components.models.materialize``).
        device: where it computes.
        dtype: of the computation, ``"fp32"`` or ``"bf16"``.
        activation_checkpointing: recompute each layer in the backward.
        compile: compile each layer's MLP and norms (attention is not a single graph).
        cpu_offload: keep weights, gradients and optimizer state in CPU memory; the optimizer steps there.
        data_parallel_replicate: how many copies of the weights there are, each sharded over its part of the ranks. A copy
            per node gathers weights within nodes only.

    Raises:
        ValueError: a number of copies that does not divide the number of processes.
    """
    shards = _shards(data_parallel_replicate)
    if compile:
        for layer in policy.decoder.layers:
            for part in (layer.mlp, layer.sa_norm, layer.mlp_norm):
                part.compile()
    if activation_checkpointing:
        set_activation_checkpointing(policy.decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    uncast = all(parameter.dtype == parse_dtype(dtype) for parameter in policy.parameters())
    if dist.get_world_size() == 1 and uncast and not cpu_offload:
        # Nobody to shard over and nothing to cast: FSDP would only copy weights and gradients.
        materialize(policy, device)
        policy.to(device)
        return
    settings: dict[str, Any] = {
        "mesh": device_mesh(device, data_parallel_replicate),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=parse_dtype(dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy(),
        # With nobody to gather from, resharding between passes would only copy, unless it frees the device.
        "reshard_after_forward": shards > 1 or cpu_offload,
        "ignored_params": quantized_parameters(policy),
    }
    # Each call moves what it shards to the device: a layer at a time, so that the whole policy is never there.
    for layer in policy.decoder.layers:
        fully_shard(layer, **settings)
    fully_shard(policy, **settings)
    materialize(policy, device, cpu_offload=cpu_offload)  # reads this rank's shards only
    for method in ("prefill", "decode", "read", "entropies"):
        register_fsdp_forward_method(policy, method)


def device_mesh(device: torch.device, data_parallel_replicate: int) -> DeviceMesh:
    """All ranks, as so many copies of what is sharded over the ranks of one.

    Raises:
        ValueError: a number of copies that does not divide the number of processes.
    """
    shards = _shards(data_parallel_replicate)
    if data_parallel_replicate == 1:
        return init_device_mesh(device.type, (shards,))
    return init_device_mesh(device.type, (data_parallel_replicate, shards), mesh_dim_names=("replicate", "shard"))


def _shards(copies: int) -> int:
    shards, rest = divmod(dist.get_world_size(), copies)
    if rest:
        raise ValueError(
            f"data_parallel_replicate is {copies}, which does not divide the {dist.get_world_size()} processes; choose a "
            "divisor, such as the number of nodes"
        )
    return shards


def sync_gradients(policy: Policy, *, on: bool) -> None:
    """Whether the next backward reduces gradients over ranks. Only that of a step's last micro-batch needs to; until then
    every rank holds whole gradients of all that is trained, in float32."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(on)


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float | None) -> float:
    """Scale gradients to a total norm of at most ``max_norm`` (None leaves them); the norm before, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, torch.inf if max_norm is None else max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def total(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def gather(value: object) -> list:
    """``value`` of every rank, in order of rank, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_main() -> bool:
    """Whether this rank is the one that prints and writes."""
    return dist.get_rank() == 0
