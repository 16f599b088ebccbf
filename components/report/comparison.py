"""What an evaluation found, to look at: a table of each measure, and plots of what is a curve."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

# Curves that are drawn into one panel, the first solid, the second dashed; and what the panel is called.
_PANELS = {
    ("feature_matching_loss",): "feature-matching loss",
    ("feature_matching_loss_unbiased",): "feature-matching loss, unbiased",
    ("feature_matching_loss_whitened",): "feature-matching loss, whitened",
    ("entropy", "cross_entropy"): "entropy (solid), cross-entropy (dashed), nats",
    ("entropy_sampling", "cross_entropy"): "entropy at the sampling temperature (solid), cross-entropy (dashed)",
}

# The percentile bootstrap of fewer groups than this leaves out the truth clearly more often than it says.
_FEW = 30

# Checkpoint -> estimate, as results.json has it.
_Estimates = Mapping[str, Mapping[str, Any]]


def comparison(summary: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each measure of ``results.json``: values, their intervals, and paired differences to the first checkpoint.
    Of a curve, first and last point are shown."""
    for name, measure in summary["measures"].items():
        curves, metrics = split_curves(measure["metrics"])
        for curve, points in curves.items():
            for k in dict.fromkeys((min(points), max(points))):
                metrics[f"{curve}/{k}"] = points[k]
        few = f"\nintervals of fewer than {_FEW} groups are too narrow" if measure["groups"] < _FEW else ""
        notes = "".join(f"\n{metric}: {note}" for metric, note in measure["notes"].items())
        first = next(iter(summary["checkpoints"]))
        table = Table(
            title=f"{name}: {measure['rows']} rows, {measure['groups']} groups",
            caption=f"bootstrap intervals of {measure['level']:.0%}; differences are paired{few}{notes}",
        )
        table.add_column("metric", overflow="fold")
        table.add_column("checkpoint", no_wrap=True)
        for heading in ("value", "interval", f"minus {first}", "interval"):
            table.add_column(heading, justify="right", no_wrap=True)
        for metric, estimates in metrics.items():
            for checkpoint, each in estimates.items():
                own = f"{each['value']:.4f}", _bounds(each["interval"], sign="")
                paired = f"{each['difference']:+.4f}", _bounds(each["difference_interval"], sign="+")
                is_first = checkpoint == first
                table.add_row(
                    metric if is_first else "",
                    checkpoint,
                    *own,
                    *(("", "") if is_first else paired),
                    end_section=checkpoint == list(estimates)[-1],
                )
        yield table


def _bounds(interval: tuple[float, float] | None, *, sign: str) -> str:
    return "" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def plot_comparison(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``MEASURE.png`` for every measure of ``results.json`` that has curves; the files."""
    written = []
    for name, measure in summary["measures"].items():
        curves, _ = split_curves(measure["metrics"])
        panels = {names: title for names, title in _PANELS.items() if all(each in curves for each in names)}
        drawn = {each for names in panels for each in names}
        panels |= {(curve,): curve for curve in curves if curve not in drawn}
        if not panels:
            continue
        figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
        for axis, (names, title) in zip(axes.flat, panels.items(), strict=True):
            for curve, style in zip(names, ("-", "--"), strict=False):
                _draw(axis, curves[curve], style)
            axis.set_title(title, fontsize=8)
            axis.set_xlabel("tokens", fontsize=8)
            if len(names) == 1:
                axis.set_xscale("log", base=2)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        axes.flat[0].legend(fontsize=8)
        figure.tight_layout()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def _draw(axis: Axes, points: Mapping[int, _Estimates], style: str) -> None:
    x, dashed = sorted(points), style == "--"
    for number, checkpoint in enumerate(points[x[0]]):
        estimates = [points[k][checkpoint] for k in x]
        label = None if dashed else checkpoint
        axis.plot(x, [each["value"] for each in estimates], style, color=f"C{number}", linewidth=1.2, label=label)
        if estimates[0]["interval"] is not None and not dashed:
            low, high = zip(*(each["interval"] for each in estimates), strict=True)
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)


def split_curves(metrics: Mapping[str, _Estimates]) -> tuple[dict[str, dict[int, _Estimates]], dict[str, _Estimates]]:
    """Curves, ``name/3`` being point 3 of one, and all other metrics."""
    curves: dict[str, dict[int, _Estimates]] = {}
    others: dict[str, _Estimates] = {}
    for metric, estimates in metrics.items():
        name, slash, point = metric.rpartition("/")
        if slash and point.isdecimal():
            curves.setdefault(name, {})[int(point)] = estimates
        else:
            others[metric] = estimates
    return curves, others
