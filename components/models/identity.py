"""Names for weights: equal if and only if they are, bit for bit, however they are sharded."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_WRAPPED = "_checkpoint_wrapped_module."


def weights_identity(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A hash, in hex, of names, dtypes, shapes and values. Collective if any of them is sharded."""
    digest = hashlib.sha256()
    for name, value in weights:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        for plain in _plain(value):
            # A clone, since a single number counts as contiguous whatever its stride is, and is then no bytes.
            flat = plain.detach().cpu().clone(memory_format=torch.contiguous_format).flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def frozen_identity(module: nn.Module) -> str | None:
    """:func:`weights_identity` of the parameters that do not train; None if all do. Collective."""
    frozen = [(name.replace(_WRAPPED, ""), p) for name, p in module.named_parameters() if not p.requires_grad]
    return weights_identity(frozen) if frozen else None


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The tensors that a weight is made of: itself, gathered if it is sharded, or what torchao holds of it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _plain(getattr(value, name))
