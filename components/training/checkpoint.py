"""Checkpoints: all that a run needs to go on exactly, beside a Hugging Face model directory that transformers loads.

``step_N/state/`` holds trained weights and optimizer state in the format of ``torch.distributed.checkpoint`` (DCP): each
rank writes its own shards, and another number of ranks can read them. ``training_state.pt`` holds what the recipe adds,
``model.safetensors`` the weights in ``save_dtype``, ``adapter/`` those of adapters as PEFT reads them, ``checkpoint.json``
(``components.training.manifest``) whose they are.
All is written under a hidden name and renamed when it is complete, so whatever has the name ``step_N`` is whole.
"""

import copy
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from components.models import Policy, adapter_config, has_adapters, parse_dtype, read_config, write_adapter, write_model
from components.training.distributed import gather, is_main, total
from components.training.manifest import (
    Manifest,
    expendable,
    list_checkpoints,
    newest_checkpoint,
    remove,
    step_name,
    sync,
    write_manifest,
)
from components.training.messages import say

_STATE = "training_state.pt"
_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # strict would miss the frozen ones


class CheckpointError(Exception):
    """A checkpoint could not be written, or the best not be told, as asked; checkpoints before it are whole."""


class HFCheckpointer:
    """Saves and restores a run.

    A save stops training only for a copy of the local shards; a thread writes them while training goes on. Ranks agree
    on the layout of the files inside DCP, in that thread, over a gloo group that nothing else uses: each thread makes
    the same calls in the same order whatever the main threads do, so they cannot wait for one another in a circle.
    Whether a save is done, and how it ended, the main threads agree on between steps (:meth:`poll`): no rank goes on
    where another stops. At most one save is in flight.

    Args:
        checkpoint_dir: the Hugging Face directory the policy came from; its configuration and tokenizer files are copied.
        output_dir: where ``step_N`` directories go.
        keep_last: how many of the newest are kept.
        keep_best: a metric of validation; the best checkpoint that was validated at its very step is kept as well.
        best_is: whether the ``"lowest"`` or the ``"highest"`` value of ``keep_best`` is the best.
        save_dtype: of ``model.safetensors``; what resumes is exact whatever it is.
        save_merged: of a policy with adapters, write the whole model with them added to its base (as it is in
            ``checkpoint_dir``, not as 4 bits hold it), besides the ``adapter/`` that is always written.
        asynchronous: False writes in the foreground: slower, and with no second copy of weights and optimizer state.

    Raises:
        ValueError: no checkpoint in ``checkpoint_dir``, ``keep_last`` below 1, or one of ``keep_best`` and ``best_is``
            without the other.
    """

    def __init__(
        self,
        *,
        checkpoint_dir: str,
        output_dir: str,
        keep_last: int = 1,
        keep_best: str | None = None,
        best_is: Literal["lowest", "highest"] | None = None,
        save_dtype: str = "fp32",
        save_merged: bool = True,
        asynchronous: bool = True,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
        if (keep_best is None) != (best_is is None):
            raise ValueError(
                f"keep_best is {keep_best!r} and best_is {best_is!r}; give both (keep_best: cross_entropy, best_is: lowest) "
                "or neither"
            )
        self.checkpoint_dir = Path(checkpoint_dir)
        self.config = read_config(checkpoint_dir)
        self.output_dir = Path(output_dir)
        self.keep_last, self.keep_best, self.best_is = keep_last, keep_best, best_is
        self.dtype = parse_dtype(save_dtype)
        self.save_merged = save_merged
        self.asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo")
        self._rank_0 = dist.new_group([0], backend="gloo")  # reads what all have written
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future[None]] | None = None

    def check_metrics(self, measured: dict[str, float]) -> None:
        """Refuse a ``keep_best`` that validation does not measure.

        Raises:
            CheckpointError: with the names there are.
        """
        if self.keep_best is not None and self.keep_best not in measured:
            raise CheckpointError(
                f"checkpointer.keep_best is {self.keep_best!r}, which validation does not measure; choose from "
                f"{', '.join(sorted(measured))}"
            )

    def save(
        self,
        manifest: Manifest,
        policy: Policy,
        optimizer: Optimizer,
        state: dict[str, Any],
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Write checkpoint ``step_N``, then drop those that need not be kept. Collective; waits for the save before.

        Args:
            manifest: whose checkpoint it is, and of which step.
            policy: sharded or not; parameters that need no gradient are not saved.
            optimizer: of the policy.
            state: what else the recipe needs to go on exactly, as ``torch.load(weights_only=True)`` reads it; rank 0's.
            extra: further tensors that training changes, sharded or not.

        Raises:
            FloatingPointError: a weight is not finite; what was saved before stays.
            CheckpointError: this save (if not ``asynchronous``) or the one before failed.
        """
        self.wait()
        if broken := next((name for name in gather(_not_finite(policy)) if name), None):
            raise FloatingPointError(
                f"{broken} is not finite after step {manifest.step}, so that nothing was saved; lower optimizer.lr or set "
                f"clip_grad_norm; {newest_checkpoint(self.output_dir)}"
            )
        partial = self.output_dir / f".{step_name(manifest.step)}.partial"
        # Also a barrier: no rank writes before rank 0 has made room.
        if reason := gather(_make_room(partial) if is_main() else None)[0]:
            raise self._save_error(manifest.step, reason)
        tensors = _tensors(policy, optimizer, extra)
        copied = tree_map_only(Tensor, lambda value: value.detach().to("cpu", copy=self.asynchronous), tensors)
        adapter = adapter_config(policy.decoder, self.checkpoint_dir) if has_adapters(policy) else None
        job = self._writer.submit(self._write, partial, manifest, copied, copy.deepcopy(state), adapter)
        self._saving = (manifest.step, job)
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Take note of a save that is done on all ranks. Collective; to be called between steps.

        Raises:
            CheckpointError: it failed, on any rank.
        """
        if self._saving is not None:
            done = torch.tensor(int(self._saving[1].done()))
            if total(done) == dist.get_world_size():
                self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Collective.

        Raises:
            CheckpointError: it failed, on any rank.
        """
        if self._saving is None:
            return
        step, job = self._saving
        error = job.exception()
        self._saving = None
        if reason := next((reason for reason in gather(error and _reason(error)) if reason), None):
            raise self._save_error(step, reason) from error
        say(f"saved {self.output_dir / step_name(step)}")

    def load(
        self,
        checkpoint: Path,
        policy: Policy,
        optimizer: Optimizer,
        extra: dict[str, Tensor] | None = None,
        *,
        hyperparameters: bool = True,
    ) -> dict[str, Any]:
        """Restore ``policy``, ``optimizer`` and the tensors of ``extra`` in place; the state saved with them. Collective.

        Args:
            checkpoint: written by any number of ranks.
            policy: built as the saved one was; what it does not train stays as it is.
            optimizer: of the policy.
            extra: as in :meth:`save`.
            hyperparameters: whether learning rate, betas and the like come from the checkpoint as well.

        Raises:
            ValueError: the checkpoint cannot be read, or is of another model or optimizer.
        """
        own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        tensors = _tensors(policy, optimizer, extra)
        try:
            dcp.load(tensors, checkpoint_id=checkpoint / "state", process_group=self._group)
            state = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
        except (Exception, CheckpointException) as error:
            raise ValueError(
                f"{checkpoint / 'state'} does not fit model and optimizer ({_reason(error)}); undo their change, or start "
                "again with resume=overwrite"
            ) from error
        set_model_state_dict(policy, tensors["policy"], options=_TRAINED)
        set_optimizer_state_dict(policy, optimizer, tensors["optimizer"], options=_TRAINED)
        if not hyperparameters:
            for group, values in zip(optimizer.param_groups, own, strict=True):
                group.update(values)
        return state

    def _write(
        self,
        partial: Path,
        manifest: Manifest,
        tensors: dict[str, Any],
        state: dict[str, Any],
        adapter: dict[str, Any] | None,
    ) -> None:
        """In the writer's thread. Behind DCP's last collective call only rank 0 has work to do."""
        dcp.save(tensors, checkpoint_id=partial / "state", process_group=self._group)
        if not is_main():
            return
        weights = _read_policy(partial / "state", self._rank_0)
        if adapter is not None:
            (partial / "adapter").mkdir()
            write_adapter(partial / "adapter", weights, self.config, adapter)
        if adapter is None or self.save_merged:
            write_model(partial, weights, self.checkpoint_dir, dtype=self.dtype, adapter=adapter)
        torch.save(state, partial / _STATE)
        for file in partial.rglob("*.safetensors"):
            # safetensors lets only the owner read what it writes; who may read the rest may read the weights.
            file.chmod((partial / _STATE).stat().st_mode)
        write_manifest(partial, manifest)
        os.replace(partial, self.output_dir / step_name(manifest.step))
        sync(self.output_dir)
        for old in expendable(
            list_checkpoints(self.output_dir),
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            best_is=self.best_is,
        ):
            remove(old)

    def _save_error(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to '{self.output_dir}' ({reason}); those before it are whole: "
            "remove the cause and run the same command with resume=auto"
        )


def _make_room(partial: Path) -> str | None:
    """An empty directory, and nothing left of saves that were killed; what prevents it, or None."""
    try:
        for stale in partial.parent.glob(".step_*.partial"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
    except OSError as error:
        return _reason(error)
    return None


def _tensors(policy: Policy, optimizer: Optimizer, extra: dict[str, Tensor] | None) -> dict[str, Any]:
    """What DCP saves and loads: views of what is trained, not copies."""
    return {
        "policy": get_model_state_dict(policy, options=_TRAINED),
        "optimizer": get_optimizer_state_dict(policy, optimizer, options=_TRAINED),
        "extra": extra or {},
    }


def _read_policy(directory: Path, alone: dist.ProcessGroup) -> dict[str, Tensor]:
    """The policy's trained weights in full, by the decoder's names, from what all ranks wrote."""
    saved = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    prefix = "policy.decoder."
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in saved.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(weights, checkpoint_id=directory, process_group=alone)
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def _not_finite(policy: Policy) -> str | None:
    """The name of a trained weight of which this rank's shard is not finite. One pass over memory, without a copy."""
    for name, parameter in policy.named_parameters():
        local = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
        if parameter.requires_grad and local.numel() and not torch.stack(local.aminmax()).isfinite().all():
            return name
    return None


def _reason(error: BaseException) -> str:
    """An error in one line; of a failure on several ranks, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
