"""One page about one run or several: curves over each other, validation before and after, where time went, what differs.

Numbers come from what a run left: ``metrics.jsonl``, ``validation/``, ``config.yaml`` and, if it was evaluated,
``results.json``. What a run lacks is left out.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from components.evaluation import Measured, load_summary, load_validations
from components.report.comparison import plot_comparison, split_curves
from components.report.curves import advantage_quantiles, plot_runs
from components.report.labels import TITLES, title
from components.report.page import write_page
from components.training import diff_configs, load_config, plain_values, read_metrics

# In the order of the page; other metrics follow, folded away.
_TRAINING = (
    "reward",
    "alignment",
    "diversity",
    "feature_matching_loss",
    "cross_entropy",
    "grad_norm",
    "advantage_std",
    "duplicate_rollouts",
    "kl",
    "lr",
    "peak_memory_gib",
    "tokens_per_second",
)

# Where a run was written does not tell it from another.
_PLACES = ("output_dir", "resume")


def report_page(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write a report of runs as one HTML file that needs nothing else.

    Args:
        run_dirs: output directories of runs, and of evaluations to be shown beside them. Configs are compared with that
            of the first run.
        out: the file.

    Raises:
        ValueError: a directory is neither a run nor an evaluation, or a file in it cannot be read.
    """
    folders = _folders(run_dirs)
    trained = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    names, runs = _names(trained), [_run(folder) for folder in trained]
    metrics = dict.fromkeys(key for run in runs for key in run["training"])
    validated = dict.fromkeys(key for run in runs for key in run["validation"])
    data = {
        "runs": [{"name": name} | run for name, run in zip(names, runs, strict=True)],
        "training": _titled(metrics, _TRAINING),
        "validation": _titled(validated, TITLES),
        "evaluations": [
            measure
            for folder, name in zip(folders, _names(folders), strict=True)
            for measure in _evaluation(folder, name)
        ],
        "differences": _differences(trained),
    }
    heading = ", ".join(_names(folders))
    return write_page(Path(out), "report", title=f"EBFT: {heading}", data=data | {"name": heading})


def report_plots(run_dirs: Sequence[str | Path], directory: str | Path) -> list[Path]:
    """The curves of :func:`report_page` as PNG files in ``directory``, those of an evaluation in a folder of its name.

    Raises:
        ValueError: a directory is neither a run nor an evaluation, or a file in it cannot be read.
    """
    folders, directory = _folders(run_dirs), Path(directory)
    trained = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    written = plot_runs(dict(zip(_names(trained), trained, strict=True)), directory)
    for folder, name in zip(folders, _names(folders), strict=True):
        if (folder / "results.json").is_file():
            written += plot_comparison(load_summary(folder), directory / name.replace("/", "_"))
    return written


def _folders(run_dirs: Sequence[str | Path]) -> list[Path]:
    folders = [Path(run_dir) for run_dir in run_dirs]
    for folder in folders:
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "results.json")):
            raise ValueError(
                f"'{folder}' is no run and no evaluation: it has neither metrics.jsonl nor results.json; name an output_dir"
            )
    return folders


def _run(folder: Path) -> dict[str, Any]:
    """What is known of one run, as plain values; a list of points is ``[step, value]``, with the margin of an interval behind
    it, or as :func:`advantage_quantiles` has it."""
    rows = read_metrics(folder)
    keys = dict.fromkeys(key for row in rows for key in row if key != "step" and not key.startswith("seconds/"))
    training = {key: [[row["step"], row[key]] for row in rows if row.get(key) is not None] for key in keys}
    validations = load_validations(folder)
    entries = [entry for each in validations.values() for entry in each.values()]
    return {
        "training": {key: points for key, points in training.items() if points},
        "advantages": advantage_quantiles(folder),
        "seconds": _seconds(rows),
        "validation": _validation(validations),
        "changes": _changes(validations),
        "rows": max((len(entry.values) for entry in entries), default=0),
        "groups": max((len(set(entry.groups or ())) for entry in entries), default=0),
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or as they were given where two are alike."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _titled(found: Collection[str], known: Collection[str]) -> list[list[Any]]:
    """Rows ``[key, title, whether it is known]``: the known ones in their order, then the others."""
    ordered = [key for key in known if key in found] + sorted(key for key in found if key not in known)
    return [[key, title(key), key in known] for key in ordered]


def _seconds(rows: list[dict]) -> dict[str, float]:
    """Mean seconds of a step in each phase, in their order; ``other`` is what no phase accounts for."""
    timed = [row for row in rows if row.get("seconds/step") is not None]
    phases = dict.fromkeys(key for row in timed for key in row if key.startswith("seconds/") and key != "seconds/step")
    means = {
        key.removeprefix("seconds/"): math.fsum(row.get(key) or 0.0 for row in timed) / len(timed) for key in phases
    }
    if timed:
        whole = math.fsum(row["seconds/step"] for row in timed) / len(timed)
        means["other"] = max(0.0, whole - math.fsum(means.values()))
    return means


def _validation(validations: dict[int, dict[str, Measured]]) -> dict[str, list[list[float | None]]]:
    """Means by step, each with the margin (95%) of its paired change since the first: what the curve is read for."""
    points: dict[str, list[list[float | None]]] = {}
    first = next(iter(validations.values()), {})
    for step, measured in validations.items():
        for name, entry in measured.items():
            margin = _finite(entry.change_since(first[name]).margin()) if name in first else None
            points.setdefault(name, []).append([step, _finite(entry.mean()), margin])
    return points


def _changes(validations: dict[int, dict[str, Measured]]) -> list[dict[str, Any]]:
    """First against last validation, metric by metric."""
    if len(validations) < 2:
        return []
    (first, before), *_, (last, after) = validations.items()
    changes = []
    for name in (name for name in before if name in after):
        change = after[name].change_since(before[name])
        changes.append(
            {
                "metric": name,
                "first": first,
                "last": last,
                "before": _finite(before[name].mean()),
                "after": _finite(after[name].mean()),
                "change": _finite(change.mean()),
                "error": _finite(change.standard_error()),
            }
        )
    return changes


def _evaluation(folder: Path, name: str) -> list[dict[str, Any]]:
    """The measures of an evaluation called ``name``, with curves apart from single numbers; nothing if it is none."""
    if not (folder / "results.json").is_file():
        return []
    summary = load_summary(folder)
    try:
        return [
            {
                "name": f"{name}: {measured}",
                "checkpoints": list(summary["checkpoints"]),
                "compare_with": summary["compare_with"],
                "notes": measure.get("notes", {}),
                **{key: measure[key] for key in ("rows", "groups", "intervals")},
                **dict(zip(("curves", "metrics"), split_curves(measure["metrics"]), strict=True)),
            }
            for measured, measure in summary["measures"].items()
        ]
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{folder / 'results.json'} is no result of recipes/evaluate.py ({error!r}); evaluate again, or leave it out"
        ) from error


def _differences(folders: Sequence[Path]) -> list[list[str | None]]:
    """Rows ``[key, value in the first run, in the second, ...]`` of what differs; None where a run has no such key."""
    configs = [_config(folder) for folder in folders]
    known = [config for config in configs if config is not None]
    if len(known) < 2:
        return []
    keys = {line.partition(":")[0]: None for other in known[1:] for line in diff_configs(known[0], other)}
    return [[key, *(None if config is None else _value(config, key) for config in configs)] for key in sorted(keys)]


def _config(folder: Path) -> DictConfig | None:
    """A run's config without where it was written."""
    if not (folder / "config.yaml").is_file():
        return None
    config = load_config(folder / "config.yaml")
    place = str(config.get("output_dir"))
    plain = OmegaConf.create({key: _without(place, value) for key, value in plain_values(config).items()})
    for key in _PLACES:
        plain.pop(key, None)
    return plain


def _without(place: str, value: Any) -> Any:
    """``value`` with paths in ``place`` as paths in ``<output_dir>``."""
    if isinstance(value, dict):
        return {key: _without(place, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without(place, inner) for inner in value]
    if isinstance(value, str) and (value == place or value.startswith(f"{place}/")):
        return "<output_dir>" + value[len(place) :]
    return value


def _value(config: DictConfig, key: str) -> str | None:
    absent = object()
    value = OmegaConf.select(config, key, default=absent)
    return None if value is absent else str(value)


def _finite(value: Any) -> float | None:
    """A number that JSON can hold, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
