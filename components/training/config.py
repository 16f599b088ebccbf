"""Strict YAML configuration: a wrong key or value is refused in one sentence, before anything is built.

The format is torchtune's: a YAML file, ``key=value`` and ``~key`` on the command line, ``${...}`` for references, and
nodes that name a class or function with ``_component_``, here nested to any depth. Unlike ``torchtune.config``, every
key is compared with the component's signature and every plain value with its annotation. Which top-level keys there are
is for each recipe to say (:func:`check_keys`).
"""

import argparse
import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class _Place:
    """Where a value stands, for messages."""

    file: str | None
    path: str = ""

    def at(self, key: Any) -> "_Place":
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        return replace(self, path=f"{self.path}{step}".removeprefix("."))

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.path}: {message}" + (f" (config file {self.file})" if self.file else ""))


def parse_args() -> DictConfig:
    """The config of a recipe's command line, ``--config FILE [key=value ...] [~key ...]``; see :func:`load_config`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set a value; ~key removes one")
    args = parser.parse_intermixed_args()
    return load_config(args.config, args.overrides)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a YAML file and apply overrides in their order. References are followed when used: a recipe may set keys too.

    Args:
        path: of the file; later errors about the config name it.
        overrides: ``a.b=c`` sets a value, read as YAML (``None`` is null too); a mapping is merged with what is there,
            and a dotted name given to a component's node replaces its ``_component_``. ``~a.b`` removes a key.

    Raises:
        ValueError: the file cannot be read, is not YAML, has a key twice or no mapping at its top; an override is
            malformed or removes what is not there; a value is still ``???``.
    """
    where = f"config file {path}"
    try:
        cfg = OmegaConf.load(path)
        if not isinstance(cfg, DictConfig):
            raise ValueError("there is a list at the top level; write 'key: value' lines")
        for override in overrides:
            where = f"override {override!r} of {path}"
            _override(cfg, override)
        where = f"config file {path}"
        for key, value in _leaves(OmegaConf.to_container(cfg)):
            if value == "???":
                raise ValueError(f"{key} has no value yet; add {key}=... to the command")
    except (OSError, LookupError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{where}: {_sentence(error)}") from error
    OmegaConf.get_cache(cfg)["config_file"] = str(path)  # no key of the config, and yet copied with it
    return cfg


def check_keys(cfg: DictConfig, allowed: Collection[str], *, required: Collection[str] = (), path: str = "") -> None:
    """Compare the keys of a config, or of a mapping at ``path`` in it that is no component, with those a recipe reads.

    Raises:
        ValueError: a key is not ``allowed``, or is ``required`` (which is part of ``allowed``) and missing.
    """
    assert set(required) <= set(allowed)
    if not isinstance(cfg, DictConfig):
        raise _Place(file=None, path=path).error(f"is {cfg!r}; write a mapping with {', '.join(allowed)}")
    place = _Place(file=_file_of(cfg), path=path)
    for key in cfg:
        if key not in allowed:
            raise place.at(key).error(f"there is no such key; {_hint(key, allowed)}")
    for key in required:
        if key not in cfg.keys():  # `in cfg` would follow references  # noqa: SIM118
            raise place.at(key).error("this key is missing; add it")


def validate_config(cfg: DictConfig) -> None:
    """Check all components of a config as :func:`instantiate` does, but build none.

    For the start of a recipe: a slip in the last node shall not wait until the model is loaded. What the recipe may still
    give passes: missing arguments and references.

    Raises:
        ValueError: see :func:`instantiate`.
    """
    _check(OmegaConf.to_container(cfg), _Place(file=_file_of(cfg)), injected=None)


def instantiate(node: DictConfig, /, *, path: str, **injected: Any) -> Any:
    """Build the component that a node describes, those inside it first, once all of them are found to be right.

    Args:
        node: a mapping with ``_component_``, the dotted name of a class or function (installed, or under the working
            directory). Its other keys are keyword arguments.
        path: where in the config the node stands, such as ``"generator.anchors"``.
        injected: keyword arguments from the recipe, for the component itself and not for those inside it.

    Raises:
        ValueError: a name that does not exist; an argument that is unknown, missing, of the wrong type, or injected and
            in the config; a reference to nothing; a ValueError or TypeError of a constructor. The message opens with
            the place.
    """
    if not _is_component(node):
        raise _Place(file=None, path=path).error(f"is {node}; write a mapping with a _component_, or remove the key")
    place = _Place(file=_file_of(node), path=path)
    plain = _plain(node)
    _check(plain, place, injected)
    return _build(plain, place, injected)


def accepts(node: DictConfig, argument: str) -> bool:
    """Whether a node's component takes ``argument`` by name and the config leaves it open."""
    parameters = _parameters(_locate(node["_component_"], _Place(file=_file_of(node)))) or ()
    return argument not in node and argument in [parameter.name for parameter in parameters]


def save_config(cfg: DictConfig, output_dir: str | Path) -> None:
    """Write the resolved config to ``output_dir/config.yaml``, all of it or nothing. For one rank to call."""
    text = OmegaConf.to_yaml(OmegaConf.create(_plain(cfg)))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    part = Path(output_dir, "config.yaml.part")
    part.write_text(text, encoding="utf-8")
    part.replace(Path(output_dir, "config.yaml"))


def diff_configs(a: DictConfig, b: DictConfig) -> list[str]:
    """What differs, by key: ``["optimizer.lr: 1e-06 -> 3e-06"]``. Lists are compared as wholes."""
    # Texts, not values: True equals 1.
    old, new = ({key: repr(value) for key, value in _leaves(_plain(cfg))} for cfg in (a, b))
    pairs = ((key, old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys()))
    return [f"{key}: {before} -> {after}" for key, before, after in pairs if before != after]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _override(cfg: DictConfig, override: str) -> None:
    key, equals, value = override.removeprefix("~").partition("=")
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(cfg, parent) if parent else cfg
    if override.startswith("~"):
        names = [str(name) for name in holder] if isinstance(holder, DictConfig) else []
        if equals or name not in names:
            raise ValueError(f"there is no {override[1:]!r} to remove; {_hint(name, names)}")
        del holder[name]
        return
    if not equals or not all(key.split(".")):
        raise ValueError("write key=value, or ~key to remove a key")
    if holder is not None and not OmegaConf.is_config(holder):
        raise ValueError(f"{parent} is {holder!r} and has no keys")  # OmegaConf would overwrite it
    if _is_dotted(value) and _is_component(OmegaConf.select(cfg, key)):
        key = f"{key}._component_"
    try:
        cfg.merge_with_dotlist([f"{key}={'null' if value == 'None' else value}"])
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{error.problem}; correct the value, which is read as YAML") from error


def _check(value: Any, place: _Place, injected: Collection[str] | None) -> None:
    """Raise for the first mistake in a plain value. ``injected`` is None if what the recipe gives is not known."""
    inside = None if injected is None else ()
    if isinstance(value, list):
        for index, inner in enumerate(value):
            _check(inner, place.at(index), inside)
    elif isinstance(value, dict):
        for key in value:
            if str(key).startswith("_") and key != "_component_":
                raise place.at(key).error("there is no such key; the only one of its kind is _component_")
        if _is_component(value):
            _check_arguments(value, place, injected)
        for key, inner in value.items():
            _check(inner, place.at(key), inside)


def _check_arguments(node: dict[str, Any], place: _Place, injected: Collection[str] | None) -> None:
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
            raise place.at(key).error(f"{name} has no argument {key!r}; {_hint(key, named)}")
    for key, parameter in named.items():
        if injected is not None and parameter.default is parameter.empty and key not in {*node, *injected}:
            raise place.error(f"{name} needs the argument {key!r}; add it")


def _build(value: Any, place: _Place, injected: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_build(inner, place.at(index), {}) for index, inner in enumerate(value)]
    if not isinstance(value, dict):
        return value
    built = {key: _build(inner, place.at(key), {}) for key, inner in value.items()}
    if not _is_component(value):
        return built
    component = _locate(built.pop("_component_"), place)
    try:
        return component(**built, **injected)
    except (TypeError, ValueError) as error:
        raise place.error(str(error)) from error


def _locate(name: Any, place: _Place) -> Callable[..., Any]:
    """The object of a dotted name; modules are imported on the way."""
    place = place.at("_component_")
    if not _is_dotted(name):
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
            hint = _hint(part, {name for name in names if not name.startswith("_")})
            raise place.error(f"{'.'.join(parts[:depth]) or 'Python'} has no {part!r}; {hint}") from error
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
    if _is_component(value) or _is_reference(value):
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
    if isinstance(kind, type) and issubclass(kind, Callable):  # type: ignore[arg-type]
        return False  # functions, modules and all else that is called: only a component can be one
    return None


def _is_component(value: Any) -> bool:
    return isinstance(value, dict | DictConfig) and "_component_" in value


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _is_dotted(name: Any) -> bool:
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


def _hint(name: Any, options: Collection[str]) -> str:
    if near := difflib.get_close_matches(str(name), options, n=1):
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(sorted(options)) or 'none'}" if len(options) <= 40 else "correct the name"


def _sentence(error: Exception) -> str:
    """What an error of YAML, OmegaConf or the file system says, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}; correct the YAML there"
    place = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
    return place + str(error).splitlines()[0]


def _plain(node: DictConfig) -> Any:
    """A node as dicts and lists, references followed."""
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise _Place(file=_file_of(node), path=str(error.full_key)).error(str(error).splitlines()[0]) from error


def _file_of(node: Any) -> str | None:
    return OmegaConf.get_cache(node._get_root()).get("config_file")
