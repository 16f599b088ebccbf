"""Two processes (gloo, CPU) that each read their shard: together the weights of one, and no rank holds them all."""

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from components.models import Policy, deferred_weights, load_decoder, materialize
from tests.checkpoints import write_model
from tests.tiny import tiny_batch, tiny_rollouts
from tests.unit.test_loading import FAMILIES, AllocatedBytes


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_rank(rank, port, directories):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for directory in directories:
        with deferred_weights():
            policy = Policy(load_decoder(directory))
        for layer in policy.decoder.layers:
            fully_shard(layer)
        fully_shard(policy)
        with AllocatedBytes() as allocated:
            materialize(policy, "cpu")
        whole = load_decoder(directory)
        sizes = [4 * parameter.numel() for parameter in whole.parameters()]
        shards = sum(4 * parameter.to_local().numel() for parameter in policy.parameters())
        rope = 4 * 256 * 8 * 3 * (12 if directory.name == "qwen2" else 1)  # torchtune gives each qwen2 layer its own
        assert shards < 0.55 * sum(sizes)
        assert allocated.peak <= shards + max(sizes) + rope
        for name, value in policy.decoder.state_dict().items():
            assert torch.equal(value.full_tensor(), whole.state_dict()[name]), name
        batch = tiny_batch()
        rollouts = tiny_rollouts(batch)
        sharded = policy(batch, rollouts, temperature=1.0).rollout
        assert torch.equal(sharded, Policy(whole)(batch, rollouts, temperature=1.0).rollout)
    dist.destroy_process_group()


def test_each_rank_reads_its_shard(tmp_path):
    for family in FAMILIES:
        write_model(tmp_path / family, family=family, num_hidden_layers=12)
    mp.spawn(check_rank, (free_port(), [tmp_path / family for family in FAMILIES]), nprocs=2)
