"""Makes docs/study.md's tables and curves from result files.

    python -m benchmarks.study_report collect translation    # outputs/study -> docs/study/translation.json, which is committed
    python -m benchmarks.study_report write                  # docs/study/*.json -> tables of docs/study.md and README, curves

A table stands between ``<!-- study: NAME -->`` and ``<!-- end -->``; what was between them is replaced.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.study import TASKS, Run, final, grid
from components.evaluation import load_summary, load_validations
from components.training import load_config, read_metrics

RESULTS, PICTURES, PAGES = Path("docs/study"), Path("docs/pictures"), (Path("docs/study.md"), Path("README.md"))
SECTIONS = (*TASKS, "ablations")
CURVES = {"cross_entropy": "cross-entropy, nats per token", "feature_matching_loss": "feature-matching loss"}
NAMES = {
    "base": "untuned",
    "sft": "SFT, same sequences",
    "sft_long": "SFT, same processor time",
    "rlvr": "RLVR",
    "ebft_0": "EBFT, gamma 0",
    "ebft_003": "EBFT, gamma 0.03",
    "ebft_01": "EBFT, gamma 0.1",
}
ABLATIONS = {
    "base": "untuned",
    "reference": "EBFT, gamma 0, half a run",
    "whitening_sample_space": "whitened by the samples' own space, as the authors' code",
    "whitening_none": "not whitened",
    "diversity_05": "half of the diversity term",
    "diversity_0": "no diversity term",
    "pooling_last_token": "last token instead of the mean",
    "layers_middle": "the middle layer alone",
    "rollout_len_2": "G = 2",
    "rollout_len_8": "G = 8",
    "stride_4": "an anchor every 4 tokens",
    "samples_2": "n = 2",
    "samples_8": "n = 8",
    "int8_network": "feature network in 8 bits",
}
# Metrics of each task's evaluation that the table shows, with a heading and the number of decimals.
COLUMNS: dict[str, dict[str, tuple[str, int]]] = {
    "translation": {
        "cross_entropy/cross_entropy": ("cross-entropy", 3),
        "calibration/feature_matching_loss_unbiased/4": ("feature-matching loss", 4),
        "translation/bleu": ("BLEU", 1),
        "translation/chrf": ("chrF", 1),
    },
    "code": {
        "cross_entropy/cross_entropy": ("cross-entropy", 3),
        "feature_matching/feature_matching_loss_unbiased/8": ("feature-matching loss", 4),
    },
    "coding": {
        "cross_entropy/cross_entropy": ("cross-entropy", 3),
        "calibration/feature_matching_loss_unbiased/8": ("feature-matching loss", 4),
        "coding/pass@1": ("held-out pass@1", 3),
    },
}


def collect(task: str) -> None:
    """Write what a task's runs and its evaluation found, as one small file."""
    body: dict[str, Any] = {}
    if task in TASKS:
        for name, runs in (("runs", final([task])), ("learning_rates", grid([task]))):
            body[name] = [_run(run) | {"arm": run.config.stem} for run in runs if run.finished()]
    evaluation = Path(load_config(f"configs/study/{task}/evaluate.yaml").output_dir)
    if (evaluation / "results.json").exists():
        body["measures"] = load_summary(evaluation)["measures"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{task}.json").write_text(json.dumps(body, indent=1) + "\n")


def _run(run: Run) -> dict[str, Any]:
    """Settings, processor time, and the validations with the standard error of their change since the first."""
    cfg = load_config(run.config, run.overrides)
    validations = load_validations(run.output_dir)
    first = next(iter(validations.values()))
    curves: dict[str, Any] = {}
    for name in [*CURVES, "feature_matching_loss_whitened", "alignment", "diversity"]:
        if name in first:
            curves[name] = {
                step: [measured[name].mean(), measured[name].change_since(first[name]).standard_error()]
                for step, measured in validations.items()
            }
    return {
        "seed": cfg.seed,
        "lr": cfg.optimizer.lr,
        "batch_size": cfg.batch_size,
        "cpu_seconds": sum(json.loads(run.record.read_text())["pieces"]),
        "validation": curves,
        "training_reward": [row.get("reward") for row in read_metrics(run.output_dir)],
    }


def result_table(
    columns: Mapping[str, tuple[str, int]],
    names: Mapping[str, str],
    measures: Mapping[str, Any],
    *,
    against: str = "base",
) -> str:
    """An arm a row: the mean over seeds of every metric, and each seed's difference to the arm ``against``, of the same seed if
    there is one; bold where the intervals of every seed leave out 0, on the same side."""
    lines = [
        "| | " + " | ".join(heading for heading, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for arm, title in names.items():
        cells = []
        for path, (_, digits) in columns.items():
            measure, metric = path.split("/", 1)
            estimates = measures[measure]["metrics"][metric]
            found = _seeds(arm, estimates)
            differences = [
                estimates[name]["differences"][other]
                for name in found
                for other in _seeds(against, estimates, like=name.replace(arm, against, 1))
                if other in estimates[name]["differences"]
            ]
            if not found or (arm != against and not differences):
                break
            cells.append(_cell([estimates[name] for name in found], differences, digits))
        if cells:
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds(arm: str, checkpoints: Iterable[str], *, like: str = "") -> list[str]:
    """The checkpoints of an arm: the one called ``like``, if there is one."""
    names = [name for name in checkpoints if re.fullmatch(rf"{arm}(_seed_\d+)?", name)]
    return [like] if like in names else names


def _cell(estimates: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]], digits: int) -> str:
    """A dash where there was nothing to measure; no interval where a mean over seeds would need one of its own."""
    if any(each["value"] is None for each in [*estimates, *differences]):
        return "–"
    mean = f"{statistics.mean(estimate['value'] for estimate in estimates):.{digits}f}"
    if not differences:
        low, high = estimates[0]["interval"]
        return f"{mean} ({low:.{digits}f} to {high:.{digits}f})" if len(estimates) == 1 else mean
    intervals = [difference["interval"] for difference in differences]
    sure = all(low > 0 for low, _ in intervals) or all(high < 0 for _, high in intervals)
    shown = ", ".join(f"{difference['value']:+.{digits}f}" for difference in differences)
    return f"{mean} (**{shown}**)" if sure else f"{mean} ({shown})"


def length_table(names: Mapping[str, str], calibration: Mapping[str, Any]) -> str:
    """The feature-matching loss by length of the rollouts, without the bias of few samples: means over seeds."""
    name = "feature_matching_loss_unbiased/"
    lengths = [metric.removeprefix(name) for metric in calibration["metrics"] if metric.startswith(name)]
    lines = [f"| | {' | '.join(lengths)} |", "|---" * (len(lengths) + 1) + "|"]
    for arm, title in names.items():
        cells = []
        for length in lengths:
            estimates = calibration["metrics"][name + length]
            values = [estimates[found]["value"] for found in _seeds(arm, estimates)]
            if values:
                cells.append("–" if None in values else f"{statistics.mean(values):.4f}")
        if cells:
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(results: Mapping[str, Any]) -> str:
    """What each learning rate changed in validation by the middle of a run."""
    names = ("cross_entropy", "feature_matching_loss", "alignment")
    lines = [
        "| arm | lr | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for run in results["learning_rates"]:
        changes = []
        for name in names:
            steps = list(run["validation"][name].items())
            (_, (before, _)), (_, (after, error)) = steps[0], steps[1]
            changes.append(f"{after - before:+.4f} ± {error:.4f}")
        lines.append(f"| {NAMES[run['arm']]} | {run['lr']:g} | {' | '.join(changes)} |")
    return "\n".join(lines)


def cost_table(results: Mapping[str, Any]) -> str:
    """Sequences and processor time of each arm, means over seeds."""
    lines = ["| arm | lr | seeds | sequences | processor seconds |", "|---|---|---|---|---|"]
    for arm, title in NAMES.items():
        runs = [run for run in results["runs"] if run["arm"] == arm]
        if runs:
            sequences = runs[0]["batch_size"] * max(int(step) for step in runs[0]["validation"]["cross_entropy"])
            seconds = statistics.mean(run["cpu_seconds"] for run in runs)
            lines.append(f"| {title} | {runs[0]['lr']:g} | {len(runs)} | {sequences} | {seconds:.0f} |")
    return "\n".join(lines)


def reward_table(results: Mapping[str, Any]) -> str:
    """What each whole run was rewarded with, over its first and its last third; each step has texts of its own, so that the
    spread over steps is the error. Rewards of different arms have different scales."""
    lines = ["| arm | seed | first third | last third | change ± standard error |", "|---|---|---|---|---|"]
    for arm, title in NAMES.items():
        for run in results["runs"]:
            rewards = [reward for reward in run["training_reward"] if reward is not None]
            if run["arm"] == arm and rewards:
                third = len(rewards) // 3
                first, last = rewards[:third], rewards[-third:]
                error = (statistics.variance(first) / third + statistics.variance(last) / third) ** 0.5
                before, after = statistics.mean(first), statistics.mean(last)
                lines.append(
                    f"| {title} | {run['seed']} | {before:.4f} | {after:.4f} | {after - before:+.4f} ± {error:.4f} |"
                )
    return "\n".join(lines)


def draw(task: str, results: Mapping[str, Any]) -> None:
    """Validation over training: the mean over seeds of each arm, with the standard error of its change."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(9, 3.2))
    for axis, (name, heading) in zip(axes, CURVES.items(), strict=True):
        for arm, title in NAMES.items():
            runs = [run for run in results["runs"] if run["arm"] == arm]
            if not runs:
                continue
            curves = [run["validation"][name] for run in runs]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            x = [int(step) * runs[0]["batch_size"] for step in steps]
            y = [statistics.mean(curve[step][0] for curve in curves) for step in steps]
            error = [(sum(curve[step][1] ** 2 for curve in curves) ** 0.5) / len(curves) for step in steps]
            axis.errorbar(x, y, yerr=error, marker="o", markersize=3, linewidth=1.2, capsize=2, label=title)
        axis.set_title(heading, fontsize=9)
        axis.set_xlabel("sequences", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"study_{task}.png", dpi=130)
    plt.close(figure)


def fill(text: str, tables: Mapping[str, str]) -> str:
    """``text`` with every table between its marks replaced."""
    for name, table in tables.items():
        marks = rf"(<!-- study: {re.escape(name)} -->\n).*?(<!-- end -->)"
        literal = table.replace("\\", r"\\")
        text = re.sub(marks, rf"\g<1>{literal}\n\g<2>", text, flags=re.DOTALL)
    return text


def write() -> None:
    """Tables and curves of all that was collected."""
    tables = {}
    for task in TASKS:
        path = RESULTS / f"{task}.json"
        if path.exists():
            results = json.loads(path.read_text())
            tables[f"{task} rates"] = rate_table(results)
            if results["runs"]:
                tables[f"{task} cost"] = cost_table(results)
                tables[f"{task} rewards"] = reward_table(results)
                draw(task, results)
            if "measures" in results:
                tables[task] = result_table(COLUMNS[task], NAMES, results["measures"])
                tables[f"{task} lengths"] = length_table(NAMES, results["measures"]["calibration"])
                for arm, title in (("sft", "SFT"), ("rlvr", "RLVR")):
                    tables[f"{task} against {title}"] = result_table(
                        COLUMNS[task], NAMES, results["measures"], against=arm
                    )
    path = RESULTS / "ablations.json"
    if path.exists():
        measures = json.loads(path.read_text())["measures"]
        tables["ablations"] = result_table(COLUMNS["translation"], ABLATIONS, measures, against="reference")
    for page in PAGES:
        page.write_text(fill(page.read_text(), tables))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["collect", "write"])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    args = parser.parse_args()
    if unknown := set(args.tasks) - set(SECTIONS):
        parser.error(f"there is no {', '.join(unknown)}; choose of {', '.join(SECTIONS)}")
    if args.what == "collect":
        for task in args.tasks or SECTIONS:
            collect(task)
    else:
        write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
