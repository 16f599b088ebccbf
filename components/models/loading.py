"""Weights of a Hugging Face directory into a decoder, one tensor at a time.

A decoder is always built on the meta device, where it has shapes and no memory. :func:`materialize` then gives each
parameter its memory and reads its weights from the memory-mapped files: at once, or, for a decoder that was loaded inside
:func:`deferred_weights`, after it was cut or sharded, and then only what is left of it on this rank. No rank ever holds more
than its shard and one tensor.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune.modules import TransformerDecoder

from components.models.decoder import build_decoder, from_hf, parse_dtype, read_config

_deferred = ContextVar("deferred", default=False)


class CheckpointWeights:
    """The weights of a Hugging Face directory by torchtune's names. Opening it reads only the headers of its files.

    Args:
        checkpoint_dir: holds ``*.safetensors``, one or several with an index.
        config: contents of its ``config.json``.

    Attributes:
        shapes: of every weight.
        converted: what some weights turn into once they are read, by name: a function such as a quantisation.

    Raises:
        ValueError: missing or damaged files, or tensors of another family.
    """

    def __init__(self, checkpoint_dir: str | Path, config: dict[str, Any]) -> None:
        self.config = config
        self.shapes: dict[str, torch.Size] = {}
        self.converted: dict[str, Callable[[Tensor], Tensor]] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for file in _files(checkpoint_dir):
            with _open(file) as tensors:
                for hf_name in tensors.keys():  # not a dict  # noqa: SIM118
                    stub = torch.empty(tensors.get_slice(hf_name).get_shape(), device="meta")
                    for name, value in from_hf({hf_name: stub}, config).items():  # none for a tied head
                        self.shapes[name] = value.shape
                        self._places[name] = file, hf_name

    def read(self, name: str, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """One whole weight, in memory of its own."""
        file, hf_name = self._places[name]
        # Opened anew each time: pages of a mapping count as memory of the process until it is closed.
        with _open(file) as tensors:
            (value,) = from_hf({hf_name: tensors.get_tensor(hf_name)}, self.config).values()
            value = value.to(device, dtype, copy=True)
        return self.converted[name](value) if name in self.converted else value


def load_decoder(
    checkpoint_dir: str | Path, dtype: torch.dtype | str = torch.float32, *, max_seq_len: int | None = None
) -> TransformerDecoder:
    """The decoder of a Hugging Face directory (``config.json`` and ``*.safetensors``), with its weights in ``dtype``.

    Inside :func:`deferred_weights`, or with ``torch.device("meta")`` as default device, its parameters stay on the meta
    device until :func:`materialize`; the checkpoint is checked all the same.

    Args:
        checkpoint_dir: llama, qwen2 or mistral.
        dtype: of the weights. A policy that is trained wants float32: at a learning rate of 1e-6 a bfloat16 weight
            does not move.
        max_seq_len: see :func:`build_decoder`.

    Raises:
        ValueError: a missing, damaged or unsupported checkpoint.
    """
    config = read_config(checkpoint_dir)
    with torch.device("meta"):
        decoder = build_decoder(config, max_seq_len=max_seq_len).to(parse_dtype(dtype))
    return fill(decoder, CheckpointWeights(checkpoint_dir, config), checkpoint_dir)


def fill(decoder: TransformerDecoder, weights: CheckpointWeights, checkpoint_dir: str | Path) -> TransformerDecoder:
    """Give a decoder on the meta device its ``weights``: now, or, where they are deferred, with :func:`materialize`.

    Raises:
        ValueError: names or shapes that differ from the decoder's.
    """
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    missing = sorted(expected.keys() - weights.shapes.keys())
    unexpected = sorted(weights.shapes.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & weights.shapes.keys() if expected[name] != weights.shapes[name])
    if missing or unexpected or wrong:
        raise ValueError(
            f"weights in '{checkpoint_dir}' do not fit its config.json "
            f"(missing: {missing[:3]}, unexpected: {unexpected[:3]}, of another shape: {wrong[:3]}); download it again"
        )
    decoder.weights = weights
    device = torch.get_default_device()
    if not _deferred.get() and device.type != "meta":
        materialize(decoder, device)
    return decoder


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Inside, decoders are loaded without memory, for :func:`materialize` to fill them later.

    What ``torch.device("meta")`` does too, but for nothing else that is built inside: a user's own network keeps its weights.
    """
    token = _deferred.set(True)
    try:
        yield
    finally:
        _deferred.reset(token)


def materialize(module: nn.Module, device: torch.device | str, *, cpu_offload: bool = False) -> None:
    """Fill every decoder in ``module`` whose weights are still deferred; what is real already stays as it is.

    A sharded parameter gets this rank's shard, read without communication. A decoder that was cut reads what is left.

    Args:
        module: sharded (``fully_shard``) or not.
        device: of the parameters; a sharded one's must be that of its mesh.
        cpu_offload: keep parameters in CPU memory, as FSDP's ``CPUOffloadPolicy`` expects them.

    Raises:
        ValueError: a file that cannot be read any more, or a parameter on the meta device that came without weights.
    """
    for decoder in [part for part in module.modules() if isinstance(getattr(part, "weights", None), CheckpointWeights)]:
        if any(parameter.is_meta for parameter in decoder.parameters()):
            _materialize_decoder(decoder, torch.device(device), cpu_offload=cpu_offload)
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device and nothing is known to fill it with; build it on a real one, inside "
                "torch.device('cpu')"
            )


@torch.no_grad()
def _materialize_decoder(decoder: nn.Module, device: torch.device, *, cpu_offload: bool) -> None:
    # state_dict's names are the plain ones, whatever wraps the layers.
    for name, parameter in decoder.state_dict(keep_vars=True).items():
        if not parameter.is_meta:
            continue
        value = decoder.weights.read(name, device=device, dtype=parameter.dtype)  # type: ignore[union-attr, operator]
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        if cpu_offload and isinstance(value, DTensor):  # FSDP brings back its own; NF4 weights are none of them
            value = value.cpu()
        # Not assigned: FSDP and others hold on to the parameter itself.
        torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for rope in [part for part in decoder.modules() if hasattr(part, "rope_init")]:
        with torch.device("cpu"):
            rope.rope_init()  # type: ignore[operator]
        rope.to(device)


def read_weights(checkpoint_dir: str | Path) -> dict[str, Tensor]:
    """All tensors of the ``*.safetensors`` files of a directory, as they are named there.

    Raises:
        ValueError: missing or damaged files.
    """
    weights: dict[str, Tensor] = {}
    for file in _files(checkpoint_dir):
        with _readable(file):
            weights.update(load_file(file))
    return weights


def _files(checkpoint_dir: str | Path) -> list[Path]:
    directory = Path(checkpoint_dir)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (KeyError, ValueError) as error:
            raise ValueError(f"{index} is no index of weights ({error}); download the checkpoint again") from error
    files = sorted(file for file in directory.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if not files:
        raise ValueError(
            f"no *.safetensors in checkpoint_dir '{checkpoint_dir}'; convert or download the checkpoint again"
        )
    return files


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    with _readable(file), safe_open(file, framework="pt") as tensors:
        yield tensors


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); download the checkpoint again") from error
