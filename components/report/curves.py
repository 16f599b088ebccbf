"""Plots of a run: what was logged per step, and the validations with their standard errors."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from components.evaluation import load_validations
from components.report.labels import title
from components.training.metrics import read_metrics

_TRAINING = ("reward", "alignment", "diversity", "feature_matching_loss", "cross_entropy", "grad_norm")
_VALIDATION = ("cross_entropy", "feature_matching_loss", "feature_matching_loss_whitened", "alignment")

# Steps, values, and their standard errors if they have any.
_Series = tuple[list[int], list[float], list[float] | None]


def plot_run(run_dir: Path) -> list[Path]:
    """Write ``training.png`` and ``validation.png`` into ``run_dir/plots``; the files that there was something to plot for."""
    written = []
    rows = read_metrics(run_dir)
    if rows:
        series: dict[str, _Series] = {}
        for name in _TRAINING:
            known = [row for row in rows if row.get(name) is not None]
            series[title(name)] = ([row["step"] for row in known], [row[name] for row in known], None)
        written.append(_draw(Path(run_dir) / "plots" / "training.png", series))
    validations = load_validations(run_dir)
    if validations:
        first = next(iter(validations.values()))
        series = {}
        for name in _VALIDATION:
            if name in first:
                # The error of the change since the first validation: that is what the curve is read for.
                errors = [
                    measured[name].change_since(first[name]).standard_error() for measured in validations.values()
                ]
                series[title(name)] = (list(validations), [m[name].mean() for m in validations.values()], errors)
        written.append(_draw(Path(run_dir) / "plots" / "validation.png", series))
    return written


def _draw(path: Path, series: dict[str, _Series]) -> Path:
    columns = 2
    figure, axes = plt.subplots(
        -(-len(series) // columns), columns, figsize=(9, 2.6 * -(-len(series) // columns)), squeeze=False
    )
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    for axis, (heading, (steps, values, errors)) in zip(axes.flat, series.items(), strict=False):
        if errors is None:
            axis.plot(steps, values, linewidth=1.2)
        else:
            axis.errorbar(steps, values, yerr=errors, marker="o", markersize=3, linewidth=1.2, capsize=3)
        axis.set_title(heading, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
