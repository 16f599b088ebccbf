"""The top level of the YAML of ``recipes/evaluate.py``; its nodes are checked against their components' signatures."""

import re

from omegaconf import DictConfig, ListConfig

from components import training
from components.training.config import is_component

REQUIRED = ("output_dir", "seed", "device", "dtype", "checkpoints", "tokenizer", "measures")
OPTIONAL = ("model", "compare_with", "resume", "resamples", "timeout_minutes")

_CHOICES = {"device": ("cpu", "cuda"), "dtype": ("fp32", "bf16"), "resume": ("auto", "overwrite")}


def check_evaluation(cfg: DictConfig) -> None:
    """Refuse a config that the recipe would not follow to the letter, before anything is built.

    Raises:
        ValueError: an unknown or missing key, a value of the wrong kind, or a component that does not take its arguments.
    """
    training.check_keys(cfg, REQUIRED + OPTIONAL, required=REQUIRED)
    training.validate_config(cfg)
    for key, choices in _CHOICES.items():
        if key in cfg and cfg[key] not in choices:
            raise ValueError(f"{key} is {cfg[key]!r}; choose one of {', '.join(choices)}")
    for key, least in (("seed", 0), ("resamples", 1)):
        value = cfg.get(key, least)
        if type(value) is not int or value < least:
            raise ValueError(f"{key} is {value!r}; give a whole number of at least {least}")
    minutes = cfg.get("timeout_minutes", 30)
    if type(minutes) not in (int, float) or not minutes > 0:
        raise ValueError(f"timeout_minutes is {minutes!r}; give a number above 0")
    if type(cfg.output_dir) is not str or not cfg.output_dir:
        raise ValueError(f"output_dir is {cfg.output_dir!r}; name a directory")
    for key in ("checkpoints", "measures"):
        names = cfg[key]
        if not isinstance(names, DictConfig) or not names or is_component(names):
            raise ValueError(f"{key} is {names!r}; write 'name: ...' for each of them")
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", str(name)):
                raise ValueError(f"{key}.{name!s}: names become files; use letters, digits and _.+-")
    if "compare_with" in cfg:
        _check_compare_with(cfg)
    for name, node in cfg.measures.items():
        if not is_component(node):
            raise ValueError(f"measures.{name!s} is {node!r}; write a mapping with a _component_")
    if "checkpoint_dir" in cfg.get("model", {}):
        raise ValueError("model.checkpoint_dir: the directories stand under checkpoints; remove the key")


def _check_compare_with(cfg: DictConfig) -> None:
    known = list(cfg.checkpoints)
    names = list(cfg.compare_with) if isinstance(cfg.compare_with, ListConfig) else []
    if not names or any(name not in known for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"compare_with is {cfg.compare_with!r}; list some of the checkpoints, each once: {', '.join(map(str, known))}"
        )
