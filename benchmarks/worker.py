"""What one process of ``benchmarks.step`` measures: a variant's step, phase by phase, or the machine's matrix product."""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torchtune.modules import TransformerDecoder

from benchmarks.obvious import ObviousGenerator, ObviousNetwork, ObviousPolicy
from components.advantages import RLOO
from components.blocks import StridedAnchors
from components.features import FrozenNetwork, HiddenStateFeatures
from components.losses import PolicyGradientLoss
from components.models import Policy, build_decoder, parse_dtype
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from components.training import clip_grad_norm, keep_freed_memory, peak_memory_gib, shard, start, stop
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


def random_decoder() -> TransformerDecoder:
    """SmolLM2's shape with weights of a trained model's size: logits hundreds wide would leave a softmax full of denormals."""
    torch.manual_seed(0)
    decoder = build_decoder(SMOLLM2)
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return decoder


class Step:
    """One training step of a variant, as a thing to call: ``ours`` as the recipe does it, ``obvious`` as others do."""

    def __init__(self, variant: str, args: argparse.Namespace) -> None:
        dtype = parse_dtype(args.dtype)
        generator: Callable[..., Any]
        if variant == "ours":
            device = start("cpu")
            keep_freed_memory()
            network: Any = FrozenNetwork(random_decoder().to(dtype))
            self.policy: Any = Policy(random_decoder())
            shard(
                self.policy,
                device,
                dtype=args.dtype,
                activation_checkpointing=args.activation_checkpointing,
                compile=args.compile,
            )
            generator = BlockParallelGenerator
        else:
            network = ObviousNetwork(random_decoder().to(dtype))
            self.policy = ObviousPolicy(random_decoder().to(dtype))
            generator = ObviousGenerator
        self.generator = generator(
            anchors=StridedAnchors(stride=args.stride, context_len=args.context),
            rollout_len=args.rollout_len,
            num_samples=args.samples,
            temperature=0.6,
        )
        self.extractor = HiddenStateFeatures(network=network)
        self.reward, self.advantage, self.loss = FeatureMatchingReward(), RLOO(), PolicyGradientLoss()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=variant == "ours")
        self.rng = torch.Generator().manual_seed(0)

    def __call__(self, length: int, lap: Callable[[str], None]) -> None:
        tokens = torch.randint(0, SMOLLM2["vocab_size"], (1, length), generator=self.rng)
        batch = Batch(
            tokens=tokens, doc_ids=torch.zeros_like(tokens), target_mask=torch.ones_like(tokens, dtype=torch.bool)
        )
        rollouts = self.generator(self.policy, batch, self.rng)
        lap("rollouts")
        features = self.extractor(batch, rollouts)
        lap("features")
        advantages = self.advantage(self.reward(batch, rollouts, features))
        logprobs = self.policy(batch, rollouts, temperature=0.6, with_target=True)
        self.loss(logprobs, advantages, batch, rollouts).loss.backward()
        lap("update")
        clip_grad_norm(list(self.policy.parameters()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lap("optimizer")


class Clock:
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


def measure_step(variant: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per phase (medians over ``args.steps``), resident memory after each step, and the peak of this process.

    Ours is warmed up by whole steps, until its memory is its own. The obvious implementation gives its memory back after
    every tensor, so that its first step costs as much as any other; it is warmed up by a short one.
    """
    step = Step(variant, args)
    warm_up = [length] * args.warmup if variant == "ours" else [32]
    for warm_up_length in warm_up:
        step(warm_up_length, lambda phase: None)
    clocks, resident = [], []
    for _ in range(args.steps):
        clock = Clock()
        step(length, clock.lap)
        clocks.append(clock.seconds)
        resident.append(resident_gib())
    medians = {name: statistics.median(seconds[name] for seconds in clocks) for name in clocks[0]}
    if variant == "ours":
        stop()
    return medians | {"peak_gib": peak_memory_gib(), "resident_gib": resident}


def resident_gib() -> float:
    """Memory of this process now (Linux)."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * 4096 / 2**30


def measure_gemm(args: argparse.Namespace) -> float:
    """FLOP/s of the fastest of some large matrix products: what no step can exceed."""
    best = 0.0
    for rows, columns in ((1024, 1536), (2048, 2048), (4096, 576)):
        a, b = (torch.randn(size, 576, dtype=parse_dtype(args.dtype)) for size in (rows, columns))
        flops = 2 * rows * columns * 576
        a @ b.T
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 1.0:
            a @ b.T
            count += 1
        best = max(best, flops * count / (time.perf_counter() - begin))
    return best


def profile_step(variant: str, length: int, args: argparse.Namespace, rows: int = 15) -> str:
    """A table of operators for each phase of one step, by their own CPU time."""
    step = Step(variant, args)
    for _ in range(args.warmup):
        step(length, lambda phase: None)
    tables, profiler = [], profile(activities=[ProfilerActivity.CPU])

    def lap(phase: str) -> None:
        nonlocal profiler
        profiler.stop()
        tables.append(
            f"{phase}\n{profiler.key_averages().table(sort_by='self_cpu_time_total', row_limit=rows, max_name_column_width=50)}"
        )
        profiler = profile(activities=[ProfilerActivity.CPU])
        profiler.start()

    profiler.start()
    step(length, lap)
    profiler.stop()
    return "\n".join(tables)
