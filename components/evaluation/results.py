"""The files of an evaluation: per measure and checkpoint what was found row by row, from which a study goes on where it
stopped, and one summary of all.

``rows/MEASURE/CHECKPOINT.json`` holds statistics and the key they belong to: fingerprints of weights and data, all settings
that decide them, and the revision of the code. ``completions/MEASURE/CHECKPOINT.jsonl`` holds what was generated,
``results.json`` values with intervals.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components import training
from components.evaluation.measures import Found
from components.evaluation.statistics import LEVEL, Estimate, Scores

SCHEMA = 1  # of rows
SUMMARY_SCHEMA = 2  # of results.json

# The percentile bootstrap of fewer groups than this leaves out the truth clearly more often than it says.
_FEW = 30


def save_found(output_dir: Path, measure: str, checkpoint: str, found: Found, key: dict[str, Any]) -> None:
    """Keep what a measure found on a checkpoint; each file whole or not at all, and the rows last."""
    if found.texts:
        lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in found.texts)
        _write(output_dir / "completions" / measure / f"{checkpoint}.jsonl", lines)
    body = {"schema": SCHEMA, "key": key, "scores": asdict(found.scores)}
    _write(_rows_path(output_dir, measure, checkpoint), json.dumps(body | {"checksum": _digest(body)}))


def load_scores(
    output_dir: Path, measure: str, checkpoint: str, key: dict[str, Any], groups: list[str]
) -> Scores | None:
    """What was found before under the same ``key`` of rows in the same ``groups``; None if nothing was or,
    which is said, under others.

    Raises:
        ValueError: the file is damaged.
    """
    path = _rows_path(output_dir, measure, checkpoint)
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text())
        intact = body.pop("checksum") == _digest(body)
        wanted = {"schema": SCHEMA} | json.loads(json.dumps(key))
        found = {"schema": body["schema"]} | body["key"]
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; delete it, and it is measured again")
    scores = Scores(**body["scores"])
    changed = [part for part in wanted | found if wanted.get(part) != found.get(part)]
    if scores.groups != groups:
        changed.append("what rows belong to")
    if changed:
        training.say(f"{checkpoint}: {measure} is measured again: {', '.join(changed)} is not what it was")
        return None
    return scores


def forget_found(output_dir: Path) -> None:
    """Remove what evaluations left in ``output_dir``, and nothing else that is there."""
    for name in ("rows", "completions", "plots"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "results.json").unlink(missing_ok=True)


def save_summary(output_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``results.json``."""
    body = {"schema": SUMMARY_SCHEMA, **summary}
    _write(output_dir / "results.json", json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def load_summary(output_dir: Path) -> dict[str, Any]:
    """What :func:`save_summary` wrote.

    Raises:
        ValueError: the file is none of ours, or of a version before this.
    """
    path = Path(output_dir) / "results.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        schema = summary["schema"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of recipes/evaluate.py ({error!r}); evaluate again, or leave it out"
        ) from error
    if schema != SUMMARY_SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, and {SUMMARY_SCHEMA} is read; evaluate again, or leave it out")
    return summary


def summarise(scores: Scores, estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """One measure's part of ``results.json``; ``scores`` are those of any checkpoint."""
    groups = len(set(scores.groups))
    few = f", which are too narrow for fewer than {_FEW}" if groups < _FEW else ""
    return {
        "rows": len(scores.groups),
        "groups": groups,
        "level": LEVEL,
        "intervals": f"bootstrap intervals of {LEVEL:.0%} over {groups} groups{few}; differences are paired",
        "metrics": {
            metric: {checkpoint: asdict(estimate) for checkpoint, estimate in each.items()}
            for metric, each in estimates.items()
        },
    }


def _rows_path(output_dir: Path, measure: str, checkpoint: str) -> Path:
    return output_dir / "rows" / measure / f"{checkpoint}.json"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
