"""Which checkpoint a run goes on from, and what may have changed since.

A run is told by its config, its data (``components.data.TrainStream`` compares them) and the weights it does not train. What
checkpoints were made with stands in their manifests, so ``config.yaml`` of the output directory decides nothing.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from components.models import Policy, frozen_identity
from components.training.config import diff_configs, hint, plain_values
from components.training.distributed import gather, is_main
from components.training.manifest import (
    Manifest,
    find_damage,
    list_checkpoints,
    read_manifest,
    step_directories,
)
from components.training.parts import Parts

# How a run is watched, saved and spread over processes, and where it stands; everything else would make it another run.
# batch_size is free because the data stream insists on an equal batch_size x processes.
_FREE = (
    "output_dir",
    "resume",
    "resume_with_changes",
    "checkpointer",
    "metric_logger",
    "log_every_n_steps",
    "keep_rollouts_every_n_steps",
    "save_every_n_steps",
    "keep_last",
    "batch_size",
    "reduce_every_micro_batch",
    "cpu_offload",
    "data_parallel_replicate",
    "timeout_minutes",
)
_SCHEDULE = ("optimizer", "lr_scheduler", "max_steps", "epochs")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An intact checkpoint to go on from.

    Attributes:
        path: its directory.
        manifest: what it says of itself.
        changed: keys of the config that differ from the checkpoint's and may (``resume_with_changes``).
    """

    path: Path
    manifest: Manifest
    changed: tuple[str, ...]

    @property
    def new_schedule(self) -> bool:
        """Whether optimizer settings, schedule or length of the run are other than they were."""
        return _among(self.changed, _SCHEDULE)


def find_checkpoint(cfg: DictConfig) -> Checkpoint | None:
    """What ``resume`` and ``output_dir`` of a config ask for: a checkpoint to go on from, or None to start. Collective.

    Ranks share the work of reading every file of the checkpoint; nothing in ``output_dir`` is written.

    Raises:
        ValueError: an ``output_dir`` that is not the same for all ranks, a used one with ``resume: never``, a directory that
            is not a run, a damaged or incomplete checkpoint, or a config that differs in more than
            ``resume_with_changes`` allows.
    """
    output_dir = Path(cfg.output_dir)
    _check_shared(output_dir)
    path = _newest(output_dir, cfg.get("resume", "never"))
    if len(set(gather(path and path.name))) > 1:
        raise ValueError(
            f"the processes see different checkpoints in output_dir '{output_dir}', as file systems that take their time may "
            "show it; wait until all nodes list the same files"
        )
    if path is None:
        return None
    manifest = read_manifest(path)
    changed = _allowed_changes(cfg, path, manifest)
    share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    if damage := next((found for found in gather(find_damage(path, share, manifest)) if found), None):
        raise ValueError(damage)
    return Checkpoint(path=path, manifest=manifest, changed=changed)


def _check_shared(output_dir: Path) -> None:
    """Every rank looks for a file that rank 0 puts beside ``output_dir``. Collective."""
    token = gather(uuid.uuid4().hex if is_main() else None)[0]
    marker = output_dir.parent / f".{output_dir.name}.{token}"
    if is_main():
        try:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            raise ValueError(
                f"output_dir '{output_dir}' cannot be made ({error}); name one that may be written"
            ) from error
    gather(None)
    seen = gather(marker.is_file())
    if is_main():
        marker.unlink()
    if not all(seen):
        ranks = ", ".join(str(rank) for rank, there in enumerate(seen) if not there)
        raise ValueError(
            f"output_dir '{output_dir}' of rank {ranks} is not that of rank 0; name a folder that all nodes share"
        )


def _newest(output_dir: Path, resume: str) -> Path | None:
    """The newest checkpoint to go on from, or None to start."""
    occupied = output_dir.is_dir() and any(output_dir.iterdir())
    if resume == "never" and occupied:
        raise ValueError(
            f"output_dir '{output_dir}' is not empty; go on with resume=auto, replace it with resume=overwrite, or name another"
        )
    if not occupied:
        return None
    if not (output_dir / "config.yaml").is_file():
        raise ValueError(f"output_dir '{output_dir}' holds something that is not a run; name another")
    if resume == "overwrite":
        return None
    complete = list_checkpoints(output_dir)
    if incomplete := [path for path in step_directories(output_dir) if path not in complete]:
        raise ValueError(
            f"{incomplete[0]} has no checkpoint.json, so it is not a complete checkpoint; move that directory away to go on "
            "from the others"
        )
    return complete[-1] if complete else None


def frozen_weights(policy: Policy, parts: Parts) -> dict[str, str]:
    """Identities of what a run reads and never trains, by the key of the config that names it. Collective."""
    network, reference = parts.network, parts.reference
    found = {
        "model": frozen_identity(policy),
        "feature_extractor": network.identity() if hasattr(network, "identity") else None,
        "reference": frozen_identity(reference) if isinstance(reference, nn.Module) else None,
    }
    return {key: identity for key, identity in found.items() if identity is not None}


def check_frozen(checkpoint: Checkpoint, frozen: dict[str, str]) -> None:
    """Refuse to go on beside other frozen weights: rewards before and after would not be of one kind, adapters be of
    another base.

    Raises:
        ValueError: weights are others, and no key under theirs was allowed to change.
    """
    before = checkpoint.manifest.frozen
    for key in sorted(before | frozen):
        if frozen.get(key) != before.get(key) and not _among(checkpoint.changed, (key,)):
            raise ValueError(
                f"{key} reads frozen weights {frozen.get(key)}, and {checkpoint.path} was trained with {before.get(key)}: the "
                "files they are loaded from have changed; restore them, or start a new run"
            )


def _allowed_changes(cfg: DictConfig, path: Path, manifest: Manifest) -> tuple[str, ...]:
    differences = {
        line.partition(":")[0]: line
        for line in diff_configs(OmegaConf.create(manifest.config), cfg)
        if not _among([line.partition(":")[0]], _FREE)
    }
    allowed = list(cfg.get("resume_with_changes", []))
    keys = {key for values in (manifest.config, plain_values(cfg)) for key in _keys(values)}
    if unknown := next((key for key in allowed if key not in keys), None):
        raise ValueError(f"resume_with_changes names {unknown!r}, which neither config has; {hint(unknown, keys)}")
    if refused := [key for key in differences if not _among([key], allowed)]:
        raise ValueError(
            f"{path} was made with another config ({'; '.join(differences[key] for key in refused)}); undo the change, name "
            f"another output_dir, or allow it with resume_with_changes=[{','.join([*allowed, *refused])}]"
        )
    return tuple(differences)


def _keys(values: Any, path: str = "") -> Iterator[str]:
    """All keys of nested mappings, dotted."""
    if isinstance(values, Mapping):
        for key, inner in values.items():
            yield f"{path}{key}"
            yield from _keys(inner, f"{path}{key}.")


def _among(keys: tuple[str, ...] | list[str], prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether any of dotted ``keys`` is one of ``prefixes`` or stands under one."""
    return any(f"{key}.".startswith(f"{prefix}.") for key in keys for prefix in prefixes)
