"""What an evaluation found, to look at: a table of each measure, and plots of what is a curve."""

import math
from collections.abc import Iterator, Mapping, Sequence
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

# Checkpoint -> estimate, as results.json has it.
_Estimates = Mapping[str, Mapping[str, Any]]


def comparison(summary: Mapping[str, Any]) -> Iterator[Table]:
    """Tables for each measure of ``results.json``: values, their intervals, and paired differences to the first checkpoint of
    ``compare_with``; then one of the differences to each further one. Of a curve, first and last point are shown."""
    first, *further = summary["compare_with"]
    for name, measure in summary["measures"].items():
        curves, metrics = split_curves(measure["metrics"])
        for curve, points in curves.items():
            for k in dict.fromkeys((min(points), max(points))):
                metrics[f"{curve}/{k}"] = points[k]
        notes = "".join(f"\n{metric}: {note}" for metric, note in measure["notes"].items())
        title, intervals = f"{name}: {measure['rows']} rows, {measure['groups']} groups", measure["intervals"]
        yield _table(metrics, first, with_values=True, title=title, caption=f"{intervals}{notes}")
        for other in further:
            yield _table(metrics, other, with_values=False, title=f"{title}, minus {other}", caption=intervals)


def _table(metrics: Mapping[str, _Estimates], other: str, *, with_values: bool, title: str, caption: str) -> Table:
    """A row for each metric and checkpoint: the value if it is wanted, and the difference to ``other``."""
    table = Table(title=title, caption=caption)
    table.add_column("metric", overflow="fold")
    table.add_column("checkpoint", no_wrap=True)
    values = ("value", "interval") if with_values else ()
    for heading in (*values, f"minus {other}", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    for metric, estimates in metrics.items():
        for number, (checkpoint, each) in enumerate(estimates.items(), start=1):
            own = (_value(each["value"]), _bounds(each["interval"])) if with_values else ()
            last = number == len(estimates)
            name = metric if number == 1 else ""
            table.add_row(name, checkpoint, *own, *_difference(each, other), end_section=last)
    return table


def _difference(estimate: Mapping[str, Any], other: str) -> tuple[str, str]:
    """Nothing in the row of ``other`` itself."""
    if other not in estimate["differences"]:
        return "", ""
    found = estimate["differences"][other]
    return _value(found["value"], sign="+"), _bounds(found["interval"], sign="+")


def _value(value: float | None, *, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def _bounds(interval: tuple[float, float] | None, *, sign: str = "") -> str:
    return "-" if interval is None else f"{interval[0]:{sign}.4f} to {interval[1]:{sign}.4f}"


def plot_comparison(summary: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write ``MEASURE.png`` for every measure of ``results.json`` that has curves: above the values, below the paired
    differences to each checkpoint of ``compare_with``; the files."""
    others = summary["compare_with"] if len(summary["checkpoints"]) > 1 else []
    colours = {checkpoint: f"C{number}" for number, checkpoint in enumerate(summary["checkpoints"])}
    written = []
    for name, measure in summary["measures"].items():
        curves, _ = split_curves(measure["metrics"])
        panels = {names: title for names, title in _PANELS.items() if all(each in curves for each in names)}
        drawn = {each for names in panels for each in names}
        panels |= {(curve,): curve for curve in curves if curve not in drawn}
        if not panels:
            continue
        size = (4.2 * len(panels), 3.4 * (1 + len(others)))
        figure, axes = plt.subplots(1 + len(others), len(panels), figsize=size, squeeze=False)
        for row, other in zip(axes, (None, *others), strict=True):
            for axis, (names, title) in zip(row, panels.items(), strict=True):
                for curve, style in zip(names, ("-", "--"), strict=False):
                    _draw(axis, _lines(curves[curve], other), colours, style)
                axis.set_title(title if other is None else f"{title}, minus {other}", fontsize=8)
                axis.set_xlabel("tokens", fontsize=8)
                if other is not None:
                    axis.axhline(0, color="black", linewidth=0.6)
                if len(names) == 1:
                    axis.set_xscale("log", base=2)
                axis.tick_params(labelsize=8)
                axis.grid(alpha=0.3)
            row[0].legend(fontsize=8)
        figure.tight_layout()
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        written.append(path)
    return written


def _lines(points: Mapping[int, _Estimates], other: str | None) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    """Checkpoint -> points ``(x, value and interval)``: of the curve itself, or of its differences to ``other``."""
    lines: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for x in sorted(points):
        for checkpoint, estimate in points[x].items():
            if checkpoint != other:
                lines.setdefault(checkpoint, []).append((x, estimate["differences"][other] if other else estimate))
    return lines


def _draw(
    axis: Axes,
    lines: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]],
    colours: Mapping[str, str],
    style: str,
) -> None:
    """Not a number makes a gap in a line, and in the band around it."""
    dashed = style == "--"
    for checkpoint, points in lines.items():
        x = [place for place, _ in points]
        y = [math.nan if found["value"] is None else found["value"] for _, found in points]
        label = None if dashed else checkpoint
        axis.plot(x, y, style, color=colours[checkpoint], linewidth=1.2, label=label)
        if not dashed:
            low, high = zip(*(found["interval"] or (math.nan, math.nan) for _, found in points), strict=True)
            axis.fill_between(x, low, high, color=colours[checkpoint], alpha=0.15, linewidth=0)


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
