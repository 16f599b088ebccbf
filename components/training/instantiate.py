"""From a config's nodes to components, strictly: a wrong key or value is refused in one sentence, before anything is built.

Unlike ``torchtune.config.instantiate``, nodes with ``_component_`` may be nested to any depth, every key is compared with
the component's signature, and every plain value with its annotation.
"""

import importlib
import inspect
import math
import os
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from components.training.config import Place, file_of, hint, is_component, is_dotted, plain_values
from components.training.kinds import mismatch


def validate_config(cfg: DictConfig) -> None:
    """Check all components of a config as :func:`instantiate` does, but build none.

    For the start of a recipe: a slip in the last node shall not wait until the model is loaded. What the recipe may still
    give passes: missing arguments and references.

    Raises:
        ValueError: see :func:`instantiate`.
    """
    plain, place = OmegaConf.to_container(cfg), Place(file=file_of(cfg))
    _check_names(plain, place)
    _check(plain, place, injected=None)


def check_component(node: DictConfig, path: str) -> None:
    """Check a node as :func:`instantiate` does for one to which the recipe gives nothing, but build nothing.

    Raises:
        ValueError: see :func:`instantiate`.
    """
    place = _place_of(node, path)
    _check_names(plain_values(node), place)
    _check(plain_values(node), place, injected=())


def instantiate(
    node: DictConfig,
    /,
    *,
    path: str,
    kind: Any = None,
    offered: Mapping[str, Any] | None = None,
    **injected: Any,
) -> Any:
    """Build the component that a node describes, those inside it first, once all of them are found to be right.

    Args:
        node: a mapping with ``_component_``, the dotted name of a class or function (installed, or under the working
            directory). Its other keys are keyword arguments.
        path: where in the config the node stands, such as ``"generator.anchors"``.
        kind: class or protocol that the component has to be of; components inside it have to be of the kind of their argument's
            annotation.
        offered: keyword arguments from the recipe for every component here that has an argument of that name, at any depth,
            and for which the config does not give one.
        injected: keyword arguments from the recipe, for the component itself and not for those inside it.

    Raises:
        ValueError: a name that does not exist; an argument that is unknown, missing, of the wrong type, or injected and
            in the config; a reference to nothing; an error of a constructor; a component of another kind
            than its place wants. The message opens with the place.
    """
    place = _place_of(node, path)
    plain = plain_values(node)
    offered = offered or {}
    _check_names(plain, place)
    _check(plain, place, injected, offered)
    built = _build(plain, place, injected, offered)
    _check_kind(built, kind, place)
    return built


def _place_of(node: Any, path: str) -> Place:
    if not is_component(node):
        shown = "null" if node is None else repr(node)
        raise Place(file=None, path=path).error(f"is {shown}; write a mapping with a _component_, or remove the key")
    return Place(file=file_of(node), path=path)


def _check_kind(built: Any, kind: Any, place: Place) -> None:
    if kind is not None and (reason := mismatch(built, kind)):
        raise place.error(reason)


def accepts(node: DictConfig, argument: str) -> bool:
    """Whether a node's component takes ``argument`` by name and the config leaves it open."""
    if not is_component(node):
        return False  # and instantiate will say so
    parameters = _parameters(_locate(node["_component_"], Place(file=file_of(node)))) or ()
    return argument not in node and argument in [parameter.name for parameter in parameters]


def _check_names(value: Any, place: Place) -> None:
    """A misspelt ``_component_`` makes a node a mapping like any other: said before that is wondered at."""
    if isinstance(value, dict):
        for name in value:
            key = str(name)
            meant = "_component_" not in value and key.endswith("_") and get_close_matches(key, ["_component_"])
            if meant or (key.startswith("_") and key != "_component_"):
                raise place.at(key).error("there is no such key; the only one of its kind is _component_")
    for step, inner in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    ):
        _check_names(inner, place.at(step))


def _check(value: Any, place: Place, injected: Collection[str] | None, offered: Collection[str] = ()) -> None:
    """Raise for the first mistake in a plain value. ``injected`` is None if what the recipe gives is not known."""
    inside = None if injected is None else ()
    if isinstance(value, float) and not math.isfinite(value):
        raise place.error(f"is {value}; give a finite number")
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check(inner, place.at(index), inside, offered)
    elif isinstance(value, dict):
        if is_component(value):
            _check_arguments(value, place, injected, offered)
        for key, inner in value.items():
            _check(inner, place.at(key), inside, offered)


def _check_arguments(
    node: dict[str, Any], place: Place, injected: Collection[str] | None, offered: Collection[str]
) -> None:
    name = node["_component_"]
    if _is_reference(name):
        return
    parameters = _parameters(_locate(name, place))
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}

    for key in injected or ():
        if key in node:
            raise place.at(key).error("the recipe gives this argument; remove the key")
        if key not in named and not takes_all:
            raise place.error(f"{name} has no argument {key!r}, which the recipe gives; choose another component")
    for key, value in node.items():
        if key in named:
            if value is None and named[key].default is None:
                continue  # whatever the annotation says
            annotation = _annotation(named[key])
            if _fits(value, annotation) is False:
                wanted = inspect.formatannotation(annotation)
                raise place.at(key).error(f"{name} wants {wanted}, not {value!r} ({type(value).__name__})")
        elif key != "_component_" and not takes_all:
            raise place.at(key).error(f"{name} has no argument {key!r}; {hint(key, named)}")
    for key, parameter in named.items():
        if injected is not None and parameter.default is parameter.empty and key not in {*node, *injected, *offered}:
            raise place.error(f"{name} needs the argument {key!r}; add it")


def _build(value: Any, place: Place, injected: Mapping[str, Any], offered: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_build(inner, place.at(index), {}, offered) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    built = {key: _build(inner, place.at(key), {}, offered) for key, inner in value.items()}
    if not is_component(value):
        return built
    component = _locate(built.pop("_component_"), place)
    named = {parameter.name: parameter for parameter in _parameters(component)}
    for key in named.keys() & built.keys():
        if is_component(value[key]):
            _check_kind(built[key], _annotation(named[key]), place.at(key))
    wanted = {key: given for key, given in offered.items() if key in named.keys() - built.keys()}
    try:
        return component(**wanted, **built, **injected)
    except (TypeError, ValueError) as error:
        raise place.error(str(error)) from error
    except Exception as error:  # a constructor that meets what it did not think of
        raise place.error(f"{type(error).__name__}: {error}") from error


def _locate(name: Any, place: Place) -> Callable[..., Any]:
    """The object of a dotted name; modules are imported on the way."""
    place = place.at("_component_")
    if not is_dotted(name):
        raise place.error(f"{name!r} is not a dotted name; write one such as torch.optim.AdamW")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    found: Any = None
    parts = name.split(".")
    for depth, part in enumerate(parts):
        if hasattr(found, part):
            found = getattr(found, part)
            continue
        module = ".".join(parts[: depth + 1])
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            if not f"{module}.".startswith(f"{error.name}."):  # it exists, but something that it imports does not
                raise place.error(f"{module} cannot be imported: {error}") from error
            paths = getattr(found, "__path__", []) if depth else None
            names = {*dir(found), *(info.name for info in pkgutil.iter_modules(paths)), *([] if depth else sys.modules)}
            near = hint(part, {name for name in names if not name.startswith("_")})
            raise place.error(f"{'.'.join(parts[:depth]) or 'Python'} has no {part!r}; {near}") from error
    if not callable(found):
        raise place.error(f"{name} is a {type(found).__name__}; name a class or function")
    return found


def _parameters(component: Callable[..., Any]) -> Collection[inspect.Parameter]:
    try:
        signature = inspect.signature(component)
    except ValueError:  # written in C, such as torch.device: it takes what it takes
        return [inspect.Parameter("any", inspect.Parameter.VAR_KEYWORD)]
    with suppress(NameError, AttributeError, TypeError):  # annotations may be strings that only type checkers can read
        signature = inspect.signature(component, eval_str=True)
    return signature.parameters.values()


def _annotation(parameter: inspect.Parameter) -> Any:
    """As written, or float for ``lr=0.001``: torchao's optimizers annotate nothing."""
    unannotated = parameter.annotation is parameter.empty
    return float if unannotated and isinstance(parameter.default, float) else parameter.annotation


def _fits(value: Any, annotation: Any) -> bool | None:
    """Whether a plain value is what an annotation asks for; None if that cannot be told."""
    kind, args = get_origin(annotation) or annotation, get_args(annotation)
    if is_component(value) or _is_reference(value):
        return None
    if kind in (Union, UnionType):
        if value == "None" and NoneType in args:
            return False  # YAML's None is null
        fits = [_fits(value, arg) for arg in args if arg is not NoneType or value is None]
        return True in fits or (False if False in fits else None)
    if kind is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if kind is float:
        return type(value) in (int, float)
    if kind in (bool, int, str, NoneType):
        return type(value) is kind
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    if kind is tuple and args and Ellipsis not in args:
        return isinstance(value, list) and len(value) == len(args) and False not in map(_fits, value, args)
    if kind in (list, tuple, Sequence, Iterable):
        return isinstance(value, list) and (not args or False not in [_fits(inner, args[0]) for inner in value])
    if isinstance(value, dict) and isinstance(kind, type) and kind is not object:
        return False  # a mapping that lacks its _component_
    if isinstance(kind, type) and issubclass(kind, Callable):  # type: ignore[arg-type]
        return False  # functions, modules and all else that is called: only a component can be one
    return None


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value
