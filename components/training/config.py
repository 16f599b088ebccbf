"""YAML files, overrides and their errors: what a config says, before anything is made of it.

The format is torchtune's: a YAML file, ``key=value`` and ``~key`` on the command line, ``${...}`` for references, and
nodes that name a class or function with ``_component_``, which ``components.training.instantiate`` builds. Which top-level
keys there are is for each recipe to say (``components.training.schema``).
"""

import argparse
import difflib
import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(frozen=True)
class Place:
    """Where a value stands, for messages."""

    file: str | None
    path: str = ""

    def at(self, key: Any) -> "Place":
        """The place of a key, or of an item of a list, in this one."""
        step = f"[{key}]" if isinstance(key, int) else f".{key}"
        return replace(self, path=f"{self.path}{step}".removeprefix("."))

    def error(self, message: str) -> ValueError:
        """``message`` with the place before it and the file behind."""
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

    A file that begins with ``base: other.yaml`` (a path from its own folder) changes that file: mappings are merged key by key,
    but a node with another ``_component_`` replaces the base's as a whole. ``base`` may be a list, of which each file changes
    those before it. References are followed in the result.

    Args:
        path: of the file; later errors about the config name it.
        overrides: ``a.b=c`` sets a value, read as YAML (``None`` is null too); a mapping is merged with what is there,
            and a dotted name given to a component's node replaces its ``_component_``. ``~a.b`` removes a key.

    Raises:
        ValueError: the file or its base cannot be read, is not YAML, has a key twice or no mapping at its top; bases go in
            a circle; an override is malformed or removes what is not there; a value is still ``???``.
    """
    where = f"config file {path}"
    try:
        cfg = OmegaConf.create(_read(Path(path), above=()))
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


def written_out(path: str | Path) -> str:
    """The text of a config file that needs no other: itself, or, if it has a ``base``, its opening comment and all keys merged.

    Raises:
        ValueError: the file or its base cannot be read, see :func:`load_config`.
    """
    text = Path(path).read_text(encoding="utf-8")
    if not re.search(r"^base:", text, re.MULTILINE):
        return text
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True)))
    note = "#\n# Written out with its bases, whose comments give the reasons for the values.\n\n"
    return comment + note + OmegaConf.to_yaml(load_config(path))


def check_keys(cfg: DictConfig, allowed: Collection[str], *, required: Collection[str] = (), path: str = "") -> None:
    """Compare the keys of a config, or of a mapping at ``path`` in it that is no component, with those a recipe reads.

    Raises:
        ValueError: a key is not ``allowed``, or is ``required`` (which is part of ``allowed``) and missing.
    """
    assert set(required) <= set(allowed)
    if not isinstance(cfg, DictConfig):
        raise Place(file=None, path=path).error(f"is {cfg!r}; write a mapping with {', '.join(allowed)}")
    place = Place(file=file_of(cfg), path=path)
    for key in cfg:
        if key not in allowed:
            raise place.at(key).error(f"there is no such key; {hint(key, allowed)}")
    for key in required:
        if key not in cfg.keys():  # `in cfg` would follow references  # noqa: SIM118
            raise place.at(key).error("this key is missing; add it")


def save_config(cfg: DictConfig, output_dir: str | Path) -> None:
    """Write the resolved config to ``output_dir/config.yaml``, all of it or nothing. For one rank to call."""
    text = OmegaConf.to_yaml(OmegaConf.create(plain_values(cfg)))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    part = Path(output_dir, "config.yaml.part")
    part.write_text(text, encoding="utf-8")
    part.replace(Path(output_dir, "config.yaml"))


def diff_configs(a: DictConfig, b: DictConfig) -> list[str]:
    """What differs, by key: ``["optimizer.lr: 1e-06 -> 3e-06"]``. Lists are compared as wholes."""
    # Texts, not values: True equals 1.
    old, new = ({key: repr(value) for key, value in _leaves(plain_values(cfg))} for cfg in (a, b))
    pairs = ((key, old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys()))
    return [f"{key}: {before} -> {after}" for key, before, after in pairs if before != after]


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A file merged over its base, as plain values with references in them. ``above`` are the files that led here."""
    if path in above:
        raise ValueError(f"base leads back to {path}; a file cannot change itself")
    try:
        cfg = OmegaConf.load(path)
    except FileNotFoundError as error:
        if not above:
            raise
        raise ValueError(f"base: there is no file {path}, which {above[-1]} names; correct the path") from error
    if not isinstance(cfg, DictConfig):
        raise ValueError(f"there is a list at the top level{f' of {path}' if above else ''}; write 'key: value' lines")
    values: dict[str, Any] = OmegaConf.to_container(cfg)  # type: ignore[assignment]
    base = values.pop("base", None)
    if base is None:
        return values
    files = base if isinstance(base, list) else [base]
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError(
            f"base is {base!r}; give the path of a YAML file, from the folder of this one, or a list of them"
        )
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, _read((path.parent / file).resolve(), (*above, path.resolve())))
    return _merge(merged, values)


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            part = old.get("_component_")
            value = _merge(old, value) if value.get("_component_", part) == part else value
        merged[key] = value
    return merged


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
            raise ValueError(f"there is no {override[1:]!r} to remove; {hint(name, names)}")
        del holder[name]
        return
    if not equals or not all(key.split(".")):
        raise ValueError("write key=value, or ~key to remove a key")
    if holder is not None and not OmegaConf.is_config(holder):
        raise ValueError(f"{parent} is {holder!r} and has no keys")  # OmegaConf would overwrite it
    if is_dotted(value) and is_component(OmegaConf.select(cfg, key)):
        key = f"{key}._component_"
    try:
        cfg.merge_with_dotlist([f"{key}={'null' if value == 'None' else value}"])
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{error.problem}; correct the value, which is read as YAML") from error


def is_component(value: Any) -> bool:
    """Whether a value is a node that names a component."""
    return isinstance(value, dict | DictConfig) and "_component_" in value


def is_dotted(name: Any) -> bool:
    """Whether a value has the form ``package.module.name``."""
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


@contextmanager
def naming_file(cfg: DictConfig) -> Iterator[None]:
    """What is refused inside is refused with the name of the config's file."""
    try:
        yield
    except ValueError as error:
        file = file_of(cfg)
        if file is None or file in str(error):
            raise
        raise ValueError(f"{error} (config file {file})") from error


def hint(name: Any, options: Collection[str]) -> str:
    """The end of a sentence that helps with a name that is not among ``options``."""
    if near := difflib.get_close_matches(str(name), options, n=1):
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(sorted(options)) or 'none'}" if len(options) <= 40 else "correct the name"


def _sentence(error: Exception) -> str:
    """What an error of YAML, OmegaConf or the file system says, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}; correct the YAML there"
    place = f"{error.full_key}: " if isinstance(error, OmegaConfBaseException) and error.full_key else ""
    return place + str(error).splitlines()[0]


def plain_values(node: DictConfig) -> Any:
    """A node as dicts and lists, references followed."""
    try:
        return OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise Place(file=file_of(node), path=str(error.full_key)).error(str(error).splitlines()[0]) from error


def file_of(node: Any) -> str | None:
    """The file that a node was loaded from."""
    return OmegaConf.get_cache(node._get_root()).get("config_file")
