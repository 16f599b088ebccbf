"""``checkpoint.json``, the manifest of a checkpoint: whose it is, and size and SHA-256 of every file beside it.

It is written last, so a ``step_N`` directory that has one is complete; and it is what a damaged file, or one of another
checkpoint, is found by. Which checkpoints are kept is decided here too, since only manifests are read for it.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

_NAME = "checkpoint.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint belongs to, and what it consists of.

    Attributes:
        step: optimizer steps done.
        config: the run's, as plain values with references followed.
        world_size: number of processes that wrote it.
        frozen: weights that are read and never trained: key of the config -> their identity.
        validated_at: step of the newest validation, or None before the first.
        metrics: means of that validation.
        files: path in the checkpoint -> ``{"bytes": int, "sha256": str}``; filled in by :func:`write_manifest`.
    """

    step: int
    config: dict[str, Any]
    world_size: int
    frozen: dict[str, str] = field(default_factory=dict)
    validated_at: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Complete the checkpoint in ``directory``: every file in it to the disk, and then the manifest that lists them."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        sync(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    body = asdict(manifest) | {"config_hash": _digest(manifest.config), "files": files}
    (directory / _NAME).write_text(json.dumps(body | {"checksum": _digest(body)}, indent=2) + "\n")
    sync(directory / _NAME)
    for path in (*(path for path in directory.rglob("*") if path.is_dir()), directory):
        sync(path)


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it cannot be read, is not as it was written, belongs to another step, or was written by another version.
    """
    try:
        body = json.loads((checkpoint / _NAME).read_text())
        intact = body.pop("checksum") == _digest(body) and checkpoint.name == step_name(body["step"])
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise damaged(checkpoint / _NAME, f"it cannot be read: {type(error).__name__} {error}", checkpoint) from error
    if not intact:
        raise damaged(checkpoint / _NAME, "its checksum or step is wrong", checkpoint)
    names = {entry.name for entry in fields(Manifest)}
    if differing := sorted((names | {"config_hash"}) ^ body.keys()):
        raise ValueError(
            f"{checkpoint} was saved by another version of this package (differing in {', '.join(differing)}); go on with that "
            "version, or start again with resume=overwrite"
        )
    return Manifest(**{name: body[name] for name in names})


def find_damage(checkpoint: Path, names: Sequence[str], manifest: Manifest) -> str | None:
    """What is wrong with the first of the files ``names`` that is not as ``manifest`` lists it; None if all are intact."""
    for name in names:
        path, wanted = checkpoint / name, manifest.files[name]
        if not path.is_file():
            return str(damaged(path, "it is missing", checkpoint))
        if (size := path.stat().st_size) != wanted["bytes"]:
            return str(damaged(path, f"it has {size} bytes instead of {wanted['bytes']}", checkpoint))
        if _sha256(path) != wanted["sha256"]:
            return str(damaged(path, "its checksum is wrong", checkpoint))
    return None


def damaged(path: Path, reason: str, checkpoint: Path) -> ValueError:
    """The error for a file of a checkpoint that cannot be used."""
    return ValueError(
        f"{path} is not what was saved ({reason}); move '{checkpoint}' away to go on from the checkpoint before it, or "
        "start again with resume=overwrite"
    )


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in step_directories(output_dir) if (path / _NAME).is_file()]


def newest_checkpoint(output_dir: str | Path) -> str:
    """What can be gone on from, in a few words for people."""
    complete = list_checkpoints(output_dir)
    return f"newest checkpoint: {complete[-1]}" if complete else f"'{output_dir}' has no checkpoint yet"


def step_directories(output_dir: str | Path) -> list[Path]:
    """All ``step_N`` directories of a run, complete or not, in order of their steps."""
    found = [path for path in Path(output_dir).glob("step_*") if path.name.removeprefix("step_").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def step_name(step: int) -> str:
    """The name of a checkpoint's directory."""
    return f"step_{step:06d}"


def expendable(
    checkpoints: Sequence[Path], *, keep_last: int, keep_best: str | None, best_is: Literal["lowest", "highest"] | None
) -> list[Path]:
    """Which of ``checkpoints`` (oldest first) are neither among the newest nor the best.

    A checkpoint competes only if ``keep_best`` was measured at its very step; of equals the older one is the best. One
    whose manifest is damaged could be the best, so it is not expendable.
    """
    kept = set(checkpoints[-keep_last:])
    if keep_best is not None:
        sign = 1 if best_is == "lowest" else -1
        scores: dict[Path, float] = {}
        for path in checkpoints:
            try:
                manifest = read_manifest(path)
            except ValueError:
                kept.add(path)
                continue
            if manifest.validated_at == manifest.step:
                scores[path] = sign * manifest.metrics.get(keep_best, math.nan)
        kept |= set(sorted((path for path in scores if not math.isnan(scores[path])), key=scores.__getitem__)[:1])
    return [path for path in checkpoints if path not in kept]


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; should that be interrupted, no half of one is left under its name."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.partial")
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def sync(path: Path) -> None:
    """Make sure a file or directory survives a power cut before anything is renamed onto it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
