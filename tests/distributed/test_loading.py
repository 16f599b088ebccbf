"""Two processes (gloo, CPU) that each read their shard: together the weights of one, and no rank holds them all."""

import socket
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor

from components.models import (
    Policy,
    deferred_weights,
    load_decoder,
    load_lora_decoder,
    materialize,
    quantized_parameters,
)
from tests.checkpoints import write_model
from tests.tiny import tiny_batch, tiny_rollouts
from tests.unit.test_loading import FAMILIES, AllocatedBytes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_rank(rank, port, loaders):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for load in loaders:
        with deferred_weights():
            policy = Policy(load())
        ignored = quantized_parameters(policy)
        for part in (*policy.decoder.layers, policy):
            fully_shard(part, ignored_params=ignored)
        torch.manual_seed(0)
        with AllocatedBytes() as allocated:
            materialize(policy, "cpu")
        torch.manual_seed(0)
        decoder = load()
        sizes = [4 * parameter.numel() for parameter in decoder.parameters()]
        shards = sum(4 * local(parameter).numel() for parameter in policy.parameters())
        if not ignored:
            rope = 4 * decoder.layers[0].attn.pos_embeddings.cache.numel()  # one for all layers, made in three steps
            assert shards < 0.55 * sum(sizes)
            assert allocated.peak <= shards + max(sizes) + 3 * rope
        for name, value in policy.decoder.state_dict().items():
            one, other = (weights_of(tensor) for tensor in (whole(value), decoder.state_dict()[name]))
            assert torch.equal(one, other), name
        batch = tiny_batch()
        rollouts = tiny_rollouts(batch)
        sharded = policy(batch, rollouts, temperature=1.0).rollout
        assert torch.equal(sharded, Policy(decoder)(batch, rollouts, temperature=1.0).rollout)
    dist.destroy_process_group()


def weights_of(value):
    return value.get_original_weight() if isinstance(value, NF4Tensor) else value


def test_each_rank_reads_its_shard(tmp_path):
    loaders = []
    for family in FAMILIES:
        write_model(tmp_path / family, family=family, num_hidden_layers=12)
        loaders.append(partial(load_decoder, tmp_path / family))
    loaders.append(partial(load_lora_decoder, tmp_path / "llama", apply_lora_to_mlp=True))
    write_model(tmp_path / "wide", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    loaders.append(partial(load_lora_decoder, tmp_path / "wide", quantize_base=True))
    mp.spawn(check_rank, (free_port(), loaders), nprocs=2)
