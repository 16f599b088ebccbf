"""Which checkpoint a run goes on from, and what may have changed since.

A run is told by its config, its data (``components.data.TrainStream`` compares them) and its feature network. What
checkpoints were made with stands in their manifests, so ``config.yaml`` of the output directory decides nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from components.training.config import diff_configs
from components.training.distributed import gather
from components.training.manifest import (
    Manifest,
    find_damage,
    list_checkpoints,
    read_manifest,
    step_directories,
)

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

    Ranks share the work of reading every file of the checkpoint; nothing is written.

    Raises:
        ValueError: a used ``output_dir`` with ``resume: never``, a directory that is not a run, a damaged or incomplete
            checkpoint, or a config that differs in more than ``resume_with_changes`` allows.
    """
    output_dir, resume = Path(cfg.output_dir), cfg.get("resume", "never")
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
    if not complete:
        return None
    path = complete[-1]
    manifest = read_manifest(path)
    changed = _allowed_changes(cfg, path, manifest)
    share = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]
    if damage := next((found for found in gather(find_damage(path, share, manifest)) if found), None):
        raise ValueError(damage)
    return Checkpoint(path=path, manifest=manifest, changed=changed)


def check_feature_network(checkpoint: Checkpoint, identity: str | None) -> None:
    """Refuse to go on with features of another network: rewards before and after would not be of one kind.

    Raises:
        ValueError: its weights are others, and no key under ``feature_extractor`` was allowed to change.
    """
    before = checkpoint.manifest.feature_network
    if identity != before and not _among(checkpoint.changed, ("feature_extractor",)):
        raise ValueError(
            f"feature_extractor.network is {identity}, and {checkpoint.path} was trained with {before}: the files it is "
            "loaded from have changed; restore them, or start a new run"
        )


def _allowed_changes(cfg: DictConfig, path: Path, manifest: Manifest) -> tuple[str, ...]:
    differences = {
        line.partition(":")[0]: line
        for line in diff_configs(OmegaConf.create(manifest.config), cfg)
        if not _among([line.partition(":")[0]], _FREE)
    }
    allowed = list(cfg.get("resume_with_changes", []))
    if refused := [key for key in differences if not _among([key], allowed)]:
        raise ValueError(
            f"{path} was made with another config ({'; '.join(differences[key] for key in refused)}); undo the change, name "
            f"another output_dir, or allow it with resume_with_changes=[{','.join([*allowed, *refused])}]"
        )
    return tuple(differences)


def _among(keys: tuple[str, ...] | list[str], prefixes: tuple[str, ...] | list[str]) -> bool:
    """Whether any of dotted ``keys`` is one of ``prefixes`` or stands under one."""
    return any(f"{key}.".startswith(f"{prefix}.") for key in keys for prefix in prefixes)
