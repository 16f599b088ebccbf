"""Plots of runs over each other: what was logged per step, validations with their intervals, and how advantages spread."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from components.evaluation import load_validations
from components.report.labels import title
from components.training import load_rollouts, read_metrics

_TRAINING = (
    "reward",
    "alignment",
    "diversity",
    "feature_matching_loss",
    "cross_entropy",
    "grad_norm",
    "duplicate_rollouts",
    "peak_memory_gib",
)
_VALIDATION = ("cross_entropy", "feature_matching_loss", "feature_matching_loss_whitened", "alignment", "diversity")

# Of the advantages at a step: the middle, 90% and 50% of them.
_QUANTILES = (0.5, 0.05, 0.95, 0.25, 0.75)


def plot_run(run_dir: Path) -> list[Path]:
    """:func:`plot_runs` of a single run, into ``run_dir/plots``."""
    return plot_runs({Path(run_dir).name: Path(run_dir)}, Path(run_dir) / "plots")


def plot_runs(runs: Mapping[str, Path], directory: Path) -> list[Path]:
    """Write ``training.png``, ``validation.png`` and ``advantages.png`` into ``directory``; the files that there was something
    to plot for.

    Args:
        runs: name -> output directory.
        directory: made if need be.
    """
    drawings = {
        "training": [(name, _training(folder)) for name, folder in runs.items()],
        "validation": [(name, _validation(folder)) for name, folder in runs.items()],
        # One panel a run: ribbons over each other could not be told apart.
        "advantages": [(name, {name: advantage_quantiles(folder)}) for name, folder in runs.items()],
    }
    order = {"training": [*map(title, _TRAINING)], "validation": [*map(title, _VALIDATION)], "advantages": list(runs)}
    written = []
    for kind, found in drawings.items():
        panels = [panel for panel in order[kind] if any(curves.get(panel) for _, curves in found)]
        if panels:
            written.append(_draw(directory / f"{kind}.png", panels, found))
    return written


def advantage_quantiles(run_dir: str | Path) -> list[list[float]]:
    """``[step, median, 5%, 95%, 25%, 75%]`` of the advantages of every kept step, over the blocks that count."""
    points = []
    for step, texts in load_rollouts(run_dir).items():
        blocks = [block for text in texts for block in text["blocks"] if block["counts"]]
        found = [sample["advantage"] for block in blocks for sample in block["samples"]]
        advantages = [advantage for advantage in found if advantage is not None]
        if advantages:
            points.append([step, *np.quantile(advantages, _QUANTILES).tolist()])
    return points


def _training(folder: Path) -> dict[str, list[list[float]]]:
    rows = read_metrics(folder)
    return {title(name): [[row["step"], row[name]] for row in rows if row.get(name) is not None] for name in _TRAINING}


def _validation(folder: Path) -> dict[str, list[list[float]]]:
    """Means, with the margin of the change since the first: that is what the curve is read for."""
    validations = load_validations(folder)
    first = next(iter(validations.values()), {})
    return {
        title(name): [
            [step, measured[name].mean(), measured[name].change_since(first[name]).margin()]
            for step, measured in validations.items()
            if name in measured
        ]
        for name in _VALIDATION
        if name in first
    }


def _draw(path: Path, panels: list[str], runs: list[tuple[str, dict[str, list[list[float]]]]]) -> Path:
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, 2.6 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (name, curves) in enumerate(runs):
            if curves.get(panel):
                _draw_curve(axis, curves[panel], color=f"C{number}", label=name)
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    if len(runs) > 1:
        axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_curve(axis: Axes, points: list[list[float]], *, color: str, label: str) -> None:
    """Points are ``[step, value]``, with the margin of an interval behind it, or with two ribbons."""
    steps, values, *rest = zip(*points, strict=True)
    if len(rest) == 1:
        axis.errorbar(
            steps, values, yerr=rest[0], marker="o", markersize=3, linewidth=1.2, capsize=3, color=color, label=label
        )
        return
    axis.plot(steps, values, marker="o" if len(steps) == 1 else None, linewidth=1.2, color=color, label=label)
    for low, high in zip(rest[::2], rest[1::2], strict=True):
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
