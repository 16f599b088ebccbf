"""Seconds, memory and arithmetic of one training step, ours against the obvious implementation.

    python -m benchmarks.step --lengths 128 256 --dtype fp32 --threads 1 --repeats 3
    python -m benchmarks.step --check

Every measurement is a process of its own; variants take turns, so that a machine whose speed drifts slows both. Printed are
medians over repeats (and the range of whole-step CPU seconds), the FLOPs of ``components.estimate``, and the share of the
machine's own matrix product that each phase of ours reaches. The model has SmolLM2-135M's shape and random weights, the text
is random tokens: neither changes the time. ``obvious`` holds its weights in ``dtype``; ours holds float32 ones and computes in
``dtype``, as in training.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.worker import PHASES, SMOLLM2, measure_gemm, measure_step, profile_step
from components.estimate import Step, flops_of, obvious_flops

VARIANTS = ("ours", "obvious")
Result = dict[str, Any]


def run(variant: str, length: int, arguments: list[str]) -> Result:
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", *arguments, "--worker", variant, str(length)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"variant": variant, "length": length, **json.loads(output.splitlines()[-1])}


def compare(args: argparse.Namespace) -> list[Result]:
    """All lengths, variants in turn."""
    arguments = sys.argv[1:]
    return [
        run(variant, length, arguments)
        for length in args.lengths
        for _ in range(args.repeats)
        for variant in args.variants
    ]


def medians(results: list[Result], variant: str, length: int) -> Result:
    """Over repeats."""
    runs = [row for row in results if (row["variant"], row["length"]) == (variant, length)]
    numbers = [name for name, value in runs[0].items() if isinstance(value, float)]
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


def show(results: list[Result], gemm: float, args: argparse.Namespace) -> None:
    """A row per length and variant, the ratio where there are both, and what ours makes of the machine."""
    table = Table(
        title=f"one step, 1 sequence, n={args.samples}, stride={args.stride}, context={args.context}, G={args.rollout_len}, "
        f"{args.dtype}, {args.threads} thread(s); CPU seconds, medians of {args.repeats}; GEMM {gemm / 1e9:.0f} GFLOP/s"
    )
    for heading in ("L", "variant", *PHASES, "whole step (range)", "wall", "peak GiB", "TFLOP"):
        table.add_column(heading, justify="right")
    for length in args.lengths:
        anchors = range(args.context, length - args.rollout_len + 1, args.stride)
        step = Step(length=length, anchors=anchors, samples=args.samples, rollout_len=args.rollout_len)
        flops = {"ours": flops_of(SMOLLM2, step), "obvious": obvious_flops(SMOLLM2, step)}
        rows = {variant: medians(results, variant, length) for variant in args.variants}
        for variant, row in rows.items():
            whole = [run["cpu"] for run in results if (run["variant"], run["length"]) == (variant, length)]
            table.add_row(
                str(length),
                variant,
                *(f"{row[f'cpu/{phase}']:.2f}" for phase in PHASES),
                f"{row['cpu']:.2f} ({min(whole):.2f}-{max(whole):.2f})",
                f"{row['wall']:.2f}",
                f"{row['peak_gib']:.2f}",
                f"{sum(flops[variant].values()) / 1e12:.2f}",
            )
        if "ours" in rows:
            shares = [f"{flops['ours'][p] / rows['ours'][f'wall/{p}'] / gemm:.0%}" for p in flops["ours"]]
            total = sum(flops["ours"].values()) / rows["ours"]["wall"] / gemm
            table.add_row("", "ours, of GEMM", *shares, "", f"{total:.0%}", "", "", "")
        if len(rows) == 2:
            ratio = {name: rows["obvious"][name] / rows["ours"][name] for name in rows["ours"]}
            cells = [f"{ratio[f'cpu/{phase}']:.1f}x" for phase in PHASES]
            less = sum(flops["obvious"].values()) / sum(flops["ours"].values())
            table.add_row(
                "",
                "ratio",
                *cells,
                f"{ratio['cpu']:.1f}x",
                f"{ratio['wall']:.1f}x",
                f"{ratio['peak_gib']:.2f}x",
                f"{less:.1f}x",
            )
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def check() -> int:
    """Both variants side by side on a core each, at L = 256; 1 if ours is less than 4 times as fast (CPU seconds)."""
    arguments = ["--warmup", "1", "--steps", "1", "--threads", "1"]
    with ThreadPoolExecutor() as pool:
        fast, slow = pool.map(lambda variant: run(variant, 256, arguments), VARIANTS)
    ratio = slow["cpu"] / fast["cpu"]
    print(
        f"L=256, fp32, one thread: obvious {slow['cpu']:.1f} s, ours {fast['cpu']:.1f} s: {ratio:.1f} times (at least 4)"
    )
    return int(ratio < 4)


def main() -> int:
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
    parser.add_argument(
        "--activation-checkpointing", action="store_true", help="ours recomputes layers in the backward"
    )
    parser.add_argument("--compile", action="store_true", help="ours compiles MLPs and norms")
    parser.add_argument("--warmup", type=int, default=2, help="steps of ours before those that count")
    parser.add_argument("--steps", type=int, default=1, help="counted steps of a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes per variant")
    parser.add_argument("--json", help="write all measurements here")
    parser.add_argument(
        "--check", action="store_true", help="some two minutes: exit 1 if ours is less than 4 times as fast"
    )
    parser.add_argument("--profile", action="store_true", help="operators of one step of each variant, and no timing")
    parser.add_argument("--worker", nargs=2, metavar=("VARIANT", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(measure_step(args.worker[0], int(args.worker[1]), args)))
        return 0
    if args.check:
        return check()
    if args.profile:
        for variant in args.variants:
            for length in args.lengths:
                print(f"\n{variant}, L = {length}\n{profile_step(variant, length, args)}")
        return 0
    gemm = measure_gemm(args)
    results = compare(args)
    show(results, gemm, args)
    if args.json:
        report = {"settings": vars(args), "gemm": gemm, "results": results}
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
