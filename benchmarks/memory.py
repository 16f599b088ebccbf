"""Memory, time and fidelity of policies and feature networks, on real weights and text.

    python -m benchmarks.memory --ranks 1
    python -m benchmarks.memory --ranks 2 --phis fp32 int8 adapter_free --rows 0
    python -m benchmarks.memory --shape Qwen2.5-0.5B --policies lora qlora --phis fp32 adapter_free

Every cell is a process (or two) of its own that takes a whole training step: bytes of weights, gradients, optimizer state
and feature network are counted tensor by tensor, resident memory is the process's. Before that, in one process, every
feature network reads the same rollouts of real text: cosine of its features, and correlation of the advantages, with those
of the float32 network. All computation is float32, but for a feature network in bfloat16. ``--shape`` measures memory
and time of a model that is not here, with zeros for weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig

from components.advantages import RLOO
from components.blocks import StridedAnchors
from components.data import PackedText, collate, load_text, load_tokenizer
from components.estimate import held_bytes
from components.features import AdapterFree, FrozenNetwork, HiddenStateFeatures, NF4WeightOnlyConfig
from components.losses import PolicyGradientLoss
from components.models import KNOWN, Policy, deferred_weights, load_decoder, load_lora_decoder, write_stand_in
from components.rewards import FeatureMatchingReward
from components.rewards.whitening import Whitening
from components.rollouts import BlockParallelGenerator
from components.training import is_main, keep_freed_memory, peak_memory_gib, place, shard, start, stop
from components.types import Batch, Features, Rollouts

MIB = 2**20
PHIS = ("fp32", "bf16", "int8", "nf4", "adapter_free")
POLICIES = ("full", "lora", "qlora")
TEMPERATURE = 0.6


def network(kind: str, checkpoint: str, policy: Policy) -> Any:
    """A feature network with deferred weights."""
    if kind == "adapter_free":
        return AdapterFree(policy=policy)
    with deferred_weights():
        decoder = load_decoder(checkpoint, "bf16" if kind == "bf16" else "fp32")
        quantization = {
            "int8": Int8WeightOnlyConfig(set_inductor_config=False),
            # torchao's 256 does not divide SmolLM2's matrices.
            "nf4": NF4WeightOnlyConfig(scaler_block_size=64),
        }.get(kind)
        return FrozenNetwork(decoder, quantization=quantization)


def build_policy(kind: str, checkpoint: str) -> Policy:
    """With deferred weights."""
    with deferred_weights():
        if kind == "full":
            return Policy(load_decoder(checkpoint))
        return Policy(load_lora_decoder(checkpoint, quantize_base=kind == "qlora"))


def read_batch(args: argparse.Namespace, rows: int) -> Batch:
    """The first rows of the text."""
    text = PackedText(
        tokenizer=load_tokenizer(args.checkpoint), source=load_text(args.data), seq_len=args.length, max_rows=rows
    )
    return collate([text[row] for row in range(rows)])


def generator(args: argparse.Namespace) -> BlockParallelGenerator:
    """Of the quickstart."""
    anchors = StridedAnchors(stride=8, context_len=8, document_mask=True)
    return BlockParallelGenerator(anchors=anchors, rollout_len=8, num_samples=4, temperature=TEMPERATURE)


def resident() -> float:
    """MiB of this process now (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / MIB


def measure_cell(args: argparse.Namespace, policy_kind: str, phi_kind: str) -> dict[str, Any]:
    """A short step to warm up, and one of a row of random tokens per rank that is timed."""
    device = start("cpu")
    keep_freed_memory()
    torch.manual_seed(0)
    policy = build_policy(policy_kind, args.checkpoint)
    shard(policy, device, dtype="fp32", activation_checkpointing=False, compile=False)
    before = resident()
    phi = network(phi_kind, args.checkpoint, policy)
    extractor = HiddenStateFeatures(network=phi)
    if isinstance(phi, FrozenNetwork):
        place(phi, device)
    phi_resident = resident() - before
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    reward, loss, rng = FeatureMatchingReward(), PolicyGradientLoss(), torch.Generator().manual_seed(0)
    for length in (args.length // 4, args.length):
        tokens = torch.randint(0, policy.decoder.tok_embeddings.num_embeddings, (1, length), generator=rng)
        batch = Batch(tokens=tokens, doc_ids=torch.zeros_like(tokens), target_mask=tokens >= 0)
        clock = time.perf_counter()
        rollouts = generator(args)(policy, batch, rng)
        advantages = RLOO()(reward(batch, rollouts, extractor(batch, rollouts)))
        logprobs = policy(batch, rollouts, temperature=TEMPERATURE, with_target=True)
        loss(logprobs, advantages, batch, rollouts).loss.backward()
        gradients = held_bytes(parameter.grad for parameter in trained)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - clock
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    result = {
        "weights": held_bytes(policy.parameters()) / MIB,
        "gradients": gradients / MIB,
        "optimizer": held_bytes(state) / MIB,
        "phi": held_bytes(phi.parameters()) / MIB if isinstance(phi, FrozenNetwork) else 0.0,
        "phi_resident": phi_resident,
        "resident": resident(),
        "peak": peak_memory_gib() * 1024,
        "seconds": seconds,
    }
    world = dist.get_world_size()
    main = is_main()
    stop()
    return result | {"world": world} if main else {}


@torch.no_grad()
def measure_fidelity(args: argparse.Namespace) -> dict[str, Any]:
    """Every network on the same rollouts, whose adapters are no longer nothing, against the float32 one."""
    device = start("cpu")
    torch.manual_seed(0)
    policy = build_policy("lora", args.checkpoint)
    shard(policy, device, dtype="fp32", activation_checkpointing=False, compile=False)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_b.weight"):
            parameter.normal_(std=0.002)
    whole = read_batch(args, rows=args.rows)
    rng = torch.Generator().manual_seed(0)
    batches = [whole.rows(slice(row, row + 1)) for row in range(args.rows)]
    drawn = [(batch, generator(args)(policy, batch, rng)) for batch in batches]
    exact = _read(network("fp32", args.checkpoint, policy), drawn)
    results: dict[str, Any] = {"blocks": sum(int(features.mask.sum()) for features in exact)}
    for kind in args.phis:
        if kind == "fp32":
            continue
        read = _read(network(kind, args.checkpoint, policy), drawn)
        cosines = torch.cat([_cosines(one, other) for one, other in zip(read, exact, strict=True)])
        results[kind] = {"cosine": float(cosines.mean()), "worst": float(cosines.min())}
        for whitening in ("feature_space", "none"):
            pair = [_advantages(drawn, features, whitening) for features in (read, exact)]
            results[kind][whitening] = float(torch.corrcoef(torch.stack(pair))[0, 1])
    stop()
    return results


def _read(phi: Any, drawn: list[tuple[Batch, Rollouts]]) -> list[Features]:
    extractor = HiddenStateFeatures(network=phi)
    return [extractor(batch, rollouts) for batch, rollouts in drawn]


def _cosines(one: Features, other: Features) -> Tensor:
    return F.cosine_similarity(one.rollout, other.rollout, dim=-1).transpose(1, 2)[one.mask].flatten()


def _advantages(drawn: list[tuple[Batch, Rollouts]], read: list[Features], whitening: Whitening) -> Tensor:
    reward = FeatureMatchingReward(whitening=whitening)
    parts = []
    for (batch, rollouts), features in zip(drawn, read, strict=True):
        advantages = RLOO()(reward(batch, rollouts, features))
        parts.append(advantages.transpose(1, 2)[features.mask].flatten())
    return torch.cat(parts)


def run(args: argparse.Namespace, worker: list[str], world: int = 1) -> dict[str, Any] | str:
    """In processes of their own: the numbers, or the sentence with which the cell was refused."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.memory", *sys.argv[1:]]
    command += ["--checkpoint", args.checkpoint, "--worker", *worker]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return json.loads(line)
    sentences = [line.partition("ValueError: ")[2] for line in done.stderr.splitlines() if "ValueError: " in line]
    if not sentences:
        raise RuntimeError(done.stderr)
    return sentences[-1]


def show_cells(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all cells and print them as they are done."""
    table = Table(title=f"MiB on one rank; seconds of a step of 1 row of {args.length} tokens a rank")
    headings = ("weights", "gradients", "optimizer", "phi", "phi_resident", "resident", "peak", "seconds")
    for heading in ("ranks", "policy", "phi", *headings):
        table.add_column(heading, justify="right")
    cells: dict[str, Any] = {}
    for world in args.ranks:
        for policy in args.policies:
            for phi in args.phis:
                if phi == "adapter_free" and policy == "full":
                    continue
                cells[f"{world} {policy} {phi}"] = cell = run(args, [policy, phi], world)
                if isinstance(cell, str):
                    console.print(f"{policy}: {cell}")
                    break
                digits = {"seconds": 2, "phi": 1, "phi_resident": 1}
                table.add_row(str(world), policy, phi, *(f"{cell[name]:.{digits.get(name, 0)}f}" for name in headings))
    console.print(table)
    return cells


def show_fidelity(args: argparse.Namespace, console: Console) -> dict[str, Any] | str:
    """Measure and print."""
    fidelity = run(args, ["fidelity", "-"])
    assert isinstance(fidelity, dict), fidelity
    table = Table(title=f"against the float32 network, {fidelity['blocks']} blocks of 4 rollouts")
    for heading in ("phi", "cosine, mean", "cosine, worst", "advantages, whitened", "advantages, not whitened"):
        table.add_column(heading, justify="right")
    for kind in args.phis:
        if kind in fidelity:
            row = (fidelity[kind][name] for name in ("cosine", "worst", "feature_space", "none"))
            table.add_row(kind, *(f"{value:.5f}" for value in row))
    console.print(table)
    return fidelity


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=KNOWN, help="zeros in the shape of this model instead of a checkpoint")
    parser.add_argument("--data", default="data/stdlib/validation.jsonl")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=12, help="of text, for the comparison of features; 0 leaves it out")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--phis", nargs="+", choices=PHIS, default=list(PHIS))
    parser.add_argument("--json", help="write all measurements here")
    parser.add_argument("--worker", nargs=2, metavar=("POLICY", "PHI"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        policy, phi = args.worker
        result = measure_fidelity(args) if policy == "fidelity" else measure_cell(args, policy, phi)
        if result:
            print(json.dumps(result))
        return
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        if args.shape:
            args.checkpoint, args.rows = folder, 0
            write_stand_in(Path(folder), KNOWN[args.shape])
        report = {"fidelity": show_fidelity(args, console) if args.rows else None, "cells": show_cells(args, console)}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
