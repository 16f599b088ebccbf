"""Whether a part is of the kind that is wanted in its place: what has other members, or is called otherwise, would fail later,
and with a traceback."""

import inspect
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Protocol, Union, get_args, get_origin

from torch import nn


class Optimizer(Protocol):
    """What the recipe asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def zero_grad(self, *, set_to_none: bool) -> Any: ...


class Scheduler(Protocol):
    """What the recipe asks of a learning-rate schedule: one step after each of the optimizer's."""

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Checkpointer(Protocol):
    """What the recipe asks of a checkpointer, see ``components.training.HFCheckpointer``."""

    def save(self, manifest: Any, policy: Any, optimizer: Any, state: Any, extra: Any) -> Any: ...

    def load(self, checkpoint: Any, policy: Any, optimizer: Any, extra: Any, *, hyperparameters: bool) -> Any: ...

    def poll(self) -> Any: ...

    def wait(self) -> Any: ...

    def check_metrics(self, metrics: Any) -> Any: ...


class MetricLogger(Protocol):
    """What the recipe asks of a logger; those of ``torchtune.training.metric_logging`` have more."""

    def log_dict(self, payload: dict[str, float], step: int) -> Any: ...

    def close(self) -> Any: ...


def mismatch(part: Any, wanted: Any) -> str | None:
    """Why ``part`` is not what is ``wanted``, in one sentence; None if it is, or if that cannot be told.

    Args:
        part: anything.
        wanted: a class, a protocol, or a union of them. A protocol wants all its members, and that they can be called as it
            says; other annotations are not looked into.
    """
    kinds = get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)
    if not all(isinstance(kind, type) for kind in kinds) or (part is None and NoneType in kinds):
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    reasons = [_reason(part, kind) for kind in kinds]
    if not all(reasons):
        return None
    name = getattr(part, "__name__", type(part).__name__)
    return f"{name} is no {' or '.join(kind.__name__ for kind in kinds)} ({reasons[0]}); name a component of that kind"


def _reason(part: Any, kind: type) -> str | None:
    if not getattr(kind, "_is_protocol", False):
        return None if isinstance(part, kind) else "it is of another class"
    members = dict(_members(kind))
    if lacking := [name for name in members if not _has(part, name)]:
        return f"it lacks {', '.join(sorted(lacking))}"
    for name, member in members.items():
        if inspect.isfunction(member):
            given = list(inspect.signature(member).parameters.values())[1:]
            if not _can_be_called(part, name, given):
                called = "it" if name == "__call__" else f"its {name}"
                return f"{called} cannot be called with ({', '.join(parameter.name for parameter in given)})"
    return None


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Name and definition of what a protocol asks for."""
    for base in kind.__mro__:
        if getattr(base, "_is_protocol", False) and base is not Protocol:
            for name in inspect.get_annotations(base):
                yield name, None
            for name, member in vars(base).items():
                if not name.startswith("_") or name in ("__call__", "__len__", "__getitem__"):
                    yield name, member


def _has(part: Any, name: str) -> bool:
    if name == "__call__":
        return callable(part)  # a class is, whatever its objects are
    return hasattr(type(part), name) or hasattr(part, name)  # the class first: a property may take long to compute


def _can_be_called(part: Any, name: str, given: list[inspect.Parameter]) -> bool:
    # A module's own __call__ takes anything.
    method = getattr(part, "forward" if name == "__call__" and isinstance(part, nn.Module) else name)
    try:
        signature = inspect.signature(method)
    except ValueError:  # written in C
        return True
    named = [parameter.name for parameter in given if parameter.kind is parameter.KEYWORD_ONLY]
    try:
        signature.bind(*[None] * (len(given) - len(named)), **dict.fromkeys(named))
    except TypeError:
        return False
    return True
