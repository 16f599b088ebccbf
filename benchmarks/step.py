"""Seconds and memory of one training step, ours against the obvious implementation, paired and process by process.

    python -m benchmarks.step --lengths 128 256 --dtype fp32 --threads 1 --repeats 3

Every measurement is a process of its own: one step to warm up, then ``--steps`` counted ones. Variants take turns, so that a
machine whose speed drifts slows both. Printed are medians over repeats (and the range of whole-step CPU seconds), and written
as JSON with ``--json FILE``. The model has SmolLM2-135M's shape and random weights, the text is random tokens: neither changes
the time. ``obvious`` holds its weights in ``dtype``; ours holds float32 ones and computes in ``dtype``, as in training.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torchtune.modules import TransformerDecoder

from benchmarks.obvious import ObviousGenerator, ObviousNetwork, ObviousPolicy
from components.advantages import RLOO
from components.blocks import StridedAnchors
from components.features import FrozenNetwork, HiddenStateFeatures
from components.losses import PolicyGradientLoss
from components.models import Policy, build_decoder, parse_dtype
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from components.training import keep_freed_memory, peak_memory_gib, shard, start, stop
from components.types import Batch

SMOLLM2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
PHASES = ("rollouts", "features", "update", "optimizer")
VARIANTS = ("ours", "obvious")


def random_decoder() -> TransformerDecoder:
    """SmolLM2's shape with weights of a trained model's size: logits hundreds wide would leave a softmax full of denormals."""
    decoder = build_decoder(SMOLLM2)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return decoder


def measure(variant: str, args: argparse.Namespace, length: int) -> dict[str, Any]:
    """CPU and wall seconds per phase (medians over steps) and peak memory of this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = start("cpu")
    dtype = parse_dtype(args.dtype)
    generator_class: Callable[..., Any]
    if variant == "ours":
        keep_freed_memory()
        network: Any = FrozenNetwork(random_decoder().to(dtype))
        policy: Any = Policy(random_decoder())
        shard(policy, device, dtype=args.dtype, activation_checkpointing=False, compile=False)
        generator_class = BlockParallelGenerator
    else:
        network = ObviousNetwork(random_decoder().to(dtype))
        policy = ObviousPolicy(random_decoder().to(dtype))
        generator_class = ObviousGenerator
    generator = generator_class(
        anchors=StridedAnchors(stride=args.stride, context_len=args.context),
        rollout_len=args.rollout_len,
        num_samples=args.samples,
        temperature=0.6,
    )
    extractor = HiddenStateFeatures(network=network)
    reward, advantage, loss = FeatureMatchingReward(), RLOO(), PolicyGradientLoss()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=variant == "ours")
    tokens = torch.randint(0, SMOLLM2["vocab_size"], (1, length))
    batch = Batch(
        tokens=tokens, doc_ids=torch.zeros_like(tokens), target_mask=torch.ones_like(tokens, dtype=torch.bool)
    )
    rng = torch.Generator().manual_seed(0)

    steps: list[dict[str, float]] = []
    for _ in range(args.steps + 1):
        clock = _Clock()
        rollouts = generator(policy, batch, rng)
        clock.lap("rollouts")
        features = extractor(batch, rollouts)
        clock.lap("features")
        advantages = advantage(reward(batch, rollouts, features))
        logprobs = policy(batch, rollouts, temperature=0.6, with_target=True)
        loss(logprobs, advantages, batch, rollouts).loss.backward()
        clock.lap("update")
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.lap("optimizer")
        steps.append(clock.seconds)
    stop()
    counted = steps[1:]
    medians = {name: statistics.median(step[name] for step in counted) for name in counted[0]}
    return medians | {"peak_gib": peak_memory_gib()}


class _Clock:
    """CPU and wall seconds between laps, and their totals."""

    def __init__(self) -> None:
        self.seconds = {"cpu": 0.0, "wall": 0.0}
        self._last = (time.process_time(), time.perf_counter())

    def lap(self, phase: str) -> None:
        now = (time.process_time(), time.perf_counter())
        for kind, after, before in zip(("cpu", "wall"), now, self._last, strict=True):
            self.seconds[f"{kind}/{phase}"] = after - before
            self.seconds[kind] += after - before
        self._last = now


def compare(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run both variants in turn, in processes of their own."""
    results = []
    for length in args.lengths:
        for _ in range(args.repeats):
            for variant in args.variants:
                command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--worker", variant, str(length)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                results.append({"variant": variant, "length": length, **json.loads(output.splitlines()[-1])})
    return results


def show(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A row per length and variant, and the ratio where there are both."""
    table = Table(
        title=f"one step, 1 sequence, n={args.samples}, stride={args.stride}, context={args.context}, G={args.rollout_len}, "
        f"{args.dtype}, {args.threads} thread(s); CPU seconds, medians of {args.repeats}"
    )
    for heading in ("L", "variant", *PHASES, "whole step (range)", "wall", "peak GiB"):
        table.add_column(heading, justify="right")
    for length in args.lengths:
        rows = {}
        for variant in args.variants:
            runs = [row for row in results if row["length"] == length and row["variant"] == variant]
            median = {
                name: statistics.median(run[name] for run in runs)
                for name in runs[0]
                if name not in ("variant", "length")
            }
            rows[variant] = median
            whole = [run["cpu"] for run in runs]
            table.add_row(
                str(length),
                variant,
                *(f"{median[f'cpu/{phase}']:.2f}" for phase in PHASES),
                f"{median['cpu']:.2f} ({min(whole):.2f}-{max(whole):.2f})",
                f"{median['wall']:.2f}",
                f"{median['peak_gib']:.2f}",
            )
        if len(rows) == 2:
            ratio = {name: rows["obvious"][name] / rows["ours"][name] for name in rows["ours"]}
            cells = [f"{ratio[f'cpu/{phase}']:.1f}x" for phase in PHASES]
            table.add_row(
                "", "ratio", *cells, f"{ratio['cpu']:.1f}x", f"{ratio['wall']:.1f}x", f"{ratio['peak_gib']:.1f}x"
            )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256], help="tokens of the sequence")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=4, help="n, rollouts per anchor")
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--context", type=int, default=8)
    parser.add_argument("--rollout-len", type=int, default=8, help="G")
    parser.add_argument("--steps", type=int, default=1, help="counted steps of a process, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant")
    parser.add_argument("--json", help="write all measurements here")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker[0], args, int(args.worker[1]))))
        return
    results = compare(args)
    show(results, args)
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
