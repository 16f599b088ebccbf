"""What saving costs training: main-thread seconds of saves, and how much slower steps are while files are written.

    python -m benchmarks.saving --length 64 --steps 20 --every 5

One process with SmolLM2-135M's shape and random weights takes ordinary steps (:mod:`benchmarks.step`) and saves every few of
them in the background. Printed are medians over steps without and with a save in flight, the seconds for which saves stopped
training, relative to a step.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import SMOLLM2
from components.advantages import RLOO
from components.blocks import StridedAnchors
from components.features import FrozenNetwork, HiddenStateFeatures
from components.losses import PolicyGradientLoss
from components.models import Policy, build_decoder
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from components.training import HFCheckpointer, Manifest, keep_freed_memory, shard, start, stop
from components.types import Batch


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=64, help="tokens of the sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", help="where checkpoints are written; a temporary directory by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as directory:
        measure(args, Path(directory))


def measure(args: argparse.Namespace, directory: Path) -> None:
    """Train, save, print."""
    device = start("cpu")
    keep_freed_memory()
    extractor = HiddenStateFeatures(network=FrozenNetwork(build_decoder(SMOLLM2)))
    policy = Policy(build_decoder(SMOLLM2))
    shard(policy, device, dtype="fp32", activation_checkpointing=False, compile=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    anchors = StridedAnchors(stride=8, context_len=8)
    generator = BlockParallelGenerator(anchors=anchors, rollout_len=8, num_samples=4, temperature=0.6)
    reward, advantage, loss = FeatureMatchingReward(), RLOO(), PolicyGradientLoss()
    tokens = torch.randint(0, SMOLLM2["vocab_size"], (1, args.length))
    batch = Batch(tokens=tokens, doc_ids=torch.zeros_like(tokens), target_mask=tokens >= 0)
    rng = torch.Generator().manual_seed(0)
    (directory / "base").mkdir()
    (directory / "base" / "config.json").write_text(json.dumps(SMOLLM2))
    checkpointer = HFCheckpointer(checkpoint_dir=str(directory / "base"), output_dir=str(directory / "run"))

    alone: list[float] = []
    beside: list[float] = []
    stopped: list[float] = []
    saved = 0  # the step of the newest save
    for step in range(1, args.steps + 1):
        clock = time.perf_counter()
        in_flight = saved > 0 and not (directory / "run" / f"step_{saved:06d}").exists()
        rollouts = generator(policy, batch, rng)
        advantages = advantage(reward(batch, rollouts, extractor(batch, rollouts)))
        logprobs = policy(batch, rollouts, temperature=0.6, with_target=True)
        loss(logprobs, advantages, batch, rollouts).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step > 1:  # the first warms up
            (beside if in_flight else alone).append(time.perf_counter() - clock)
        clock = time.perf_counter()
        if step % args.every == 0:
            checkpointer.save(Manifest(step=step, config={}, world_size=1), policy, optimizer, {})
            stopped.append(time.perf_counter() - clock)
            saved = step
        else:
            checkpointer.poll()
    checkpointer.wait()
    stop()
    seconds = statistics.median(alone)
    print(f"a step, nothing being saved: {seconds:.2f} s, median of {len(alone)}")
    if beside:
        print(f"a step while a save is written: {statistics.median(beside):.2f} s, median of {len(beside)}")
    shown = ", ".join(f"{value:.2f} s" for value in stopped)
    print(f"saves stop training for: {shown}; median {statistics.median(stopped) / seconds:.1%} of a step")


if __name__ == "__main__":
    main()
