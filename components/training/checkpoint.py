"""Checkpoints: a Hugging Face model directory that transformers loads, with the training state beside the weights.

A checkpoint is written under a hidden name and renamed when it is complete, so whatever has the name ``step_N`` is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from components.models import Policy, from_hf, parse_dtype, read_config, read_weights, to_hf
from components.training.distributed import is_main

_STATE = "training_state.pt"
_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_LOAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
# What makes a directory of weights a model: everything of the base checkpoint that is small and not weights.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


class HFCheckpointer:
    """Saves and restores a run.

    Args:
        checkpoint_dir: the Hugging Face directory the policy came from; its configuration and tokenizer files are copied.
        output_dir: where ``step_N`` directories go.
        keep_last: how many of them are kept.
        save_dtype: of the saved weights; below fp32, what resumes is no longer exactly what was saved.

    Raises:
        ValueError: no checkpoint in ``checkpoint_dir``, or ``keep_last`` below 1.
    """

    def __init__(self, *, checkpoint_dir: str, output_dir: str, keep_last: int = 1, save_dtype: str = "fp32") -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
        self.checkpoint_dir = Path(checkpoint_dir)
        self.config = read_config(checkpoint_dir)
        self.output_dir = Path(output_dir)
        self.keep_last = keep_last
        self.dtype = parse_dtype(save_dtype)

    def save(self, step: int, policy: Policy, optimizer: Optimizer, state: dict[str, Any]) -> Path:
        """Write checkpoint ``step_N``, then drop the oldest beyond ``keep_last``. Collective; rank 0 writes.

        Args:
            step: optimizer steps done.
            policy: sharded or not.
            optimizer: its state is saved in full.
            state: whatever else the recipe needs to go on exactly, as ``torch.save`` takes it.

        Raises:
            FloatingPointError: a weight is not finite; what was saved before stays.
        """
        weights: dict[str, Any] = get_model_state_dict(policy, options=_FULL)
        optimizer_state = get_optimizer_state_dict(policy, optimizer, options=_FULL)
        final = self.output_dir / f"step_{step:06d}"
        if is_main():
            broken = [name for name, value in weights.items() if not value.isfinite().all()]
            if broken:
                raise FloatingPointError(
                    f"{broken[0]} is not finite after step {step}: nothing was saved, the newest checkpoint in "
                    f"'{self.output_dir}' is good; lower optimizer.lr or set clip_grad_norm"
                )
            partial = self.output_dir / f".{final.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write_model(partial, weights)
            torch.save({"step": step, "optimizer": optimizer_state, **state}, partial / _STATE)
            for file in partial.iterdir():
                _sync(file)
            if final.exists():  # the same step of an earlier attempt; it is replaced, never mixed
                shutil.rmtree(final)
            os.replace(partial, final)
            _sync(self.output_dir)
            for old in list_checkpoints(self.output_dir)[: -self.keep_last]:
                shutil.rmtree(old)
        return final

    def load(self, path: Path, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
        """Restore ``policy`` and ``optimizer`` in place from a checkpoint and return the state saved with it. Collective.

        Raises:
            ValueError: a checkpoint that cannot be read.
        """
        try:
            state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises what the damage happens to hit
            raise ValueError(
                f"{path / _STATE} cannot be read ({error}); remove that directory to resume earlier"
            ) from error
        weights = from_hf(read_weights(path), self.config)
        set_model_state_dict(policy, {f"decoder.{name}": value for name, value in weights.items()}, options=_LOAD)
        set_optimizer_state_dict(policy, optimizer, state.pop("optimizer"), options=_LOAD)
        return state

    def _write_model(self, directory: Path, weights: dict[str, torch.Tensor]) -> None:
        for pattern in _COMPANIONS:
            for file in self.checkpoint_dir.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, directory / file.name)
        config = self.config | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        named = {name.removeprefix("decoder."): value.to(self.dtype) for name, value in weights.items()}
        save_file(to_hf(named, self.config), directory / "model.safetensors", metadata={"format": "pt"})
        # safetensors lets only the owner read what it writes; who may read the rest may read the weights.
        (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path for path in Path(output_dir).glob("step_*") if (path / _STATE).is_file())


def _sync(path: Path) -> None:
    """Make sure a file or directory survives a power cut before anything is renamed onto it."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
