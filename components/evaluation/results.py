"""The files of an evaluation: per measure and checkpoint what was found row by row, from which a study goes on where it
stopped, and one summary of all.

``rows/MEASURE/CHECKPOINT.json`` holds statistics and the key they belong to: fingerprints of weights and data, and all settings
that decide them. ``completions/MEASURE/CHECKPOINT.jsonl`` holds what was generated, ``results.json`` values with intervals.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.evaluation.measures import Found
from components.evaluation.statistics import LEVEL, Estimate, Scores

SCHEMA = 1


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
    """What was found before under the same ``key`` of rows in the same ``groups``; None if nothing was, or under others.

    Raises:
        ValueError: the file is damaged.
    """
    path = _rows_path(output_dir, measure, checkpoint)
    if not path.exists():
        return None
    try:
        body = json.loads(path.read_text())
        intact = body.pop("checksum") == _digest(body)
        if intact and (body["schema"], body["key"]) != (SCHEMA, json.loads(json.dumps(key))):
            return None
    except (OSError, ValueError, AttributeError, LookupError, TypeError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged; delete it, and it is measured again")
    scores = Scores(**body["scores"])
    return scores if scores.groups == groups else None


def save_summary(output_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``results.json``."""
    _write(output_dir / "results.json", json.dumps({"schema": SCHEMA, **summary}, indent=2, ensure_ascii=False) + "\n")


def load_summary(output_dir: Path) -> dict[str, Any]:
    """What :func:`save_summary` wrote."""
    return json.loads((Path(output_dir) / "results.json").read_text())


def summarise(scores: Scores, estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, Any]:
    """One measure's part of ``results.json``; ``scores`` are those of any checkpoint."""
    return {
        "rows": len(scores.groups),
        "groups": len(set(scores.groups)),
        "level": LEVEL,
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
