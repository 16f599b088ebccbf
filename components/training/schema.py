"""The top level of a recipe's YAML: which keys there are, which must be there, and what the plain ones may hold.

Nodes with ``_component_`` are checked against the component's own signature (``components.training.instantiate``).
"""

import math
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from components.training.config import check_keys, is_component, plain_values
from components.training.instantiate import check_component, validate_config

REQUIRED = (
    "output_dir",
    "seed",
    "device",
    "dtype",
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "batch_size",
    "loss",
    "optimizer",
)
OPTIONAL = (
    "validation",
    "gradient_accumulation_steps",
    "reduce_every_micro_batch",
    "max_steps",
    "epochs",
    "generator",
    "feature_extractor",
    "reward",
    "advantage",
    "lr_scheduler",
    "reference",
    "clip_grad_norm",
    "activation_checkpointing",
    "compile",
    "cpu_offload",
    "data_parallel_replicate",
    "timeout_minutes",
    "save_every_n_steps",
    "keep_last",
    "resume",
    "resume_with_changes",
    "metric_logger",
    "log_every_n_steps",
    "keep_rollouts_every_n_steps",
)
_COMPONENTS = (
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "loss",
    "optimizer",
    "generator",
    "feature_extractor",
    "reward",
    "advantage",
    "lr_scheduler",
    "reference",
)
VALIDATION_REQUIRED = ("dataset", "every_n_steps", "batch_size")
VALIDATION_OPTIONAL = ("generator", "reward")

_COUNTS = (
    "batch_size",
    "gradient_accumulation_steps",
    "data_parallel_replicate",
    "max_steps",
    "epochs",
    "save_every_n_steps",
    "keep_last",
    "log_every_n_steps",
    "keep_rollouts_every_n_steps",
)
_SWITCHES = ("activation_checkpointing", "compile", "cpu_offload", "reduce_every_micro_batch")
_CHOICES = {
    "device": ("cpu", "cuda"),
    "dtype": ("fp32", "bf16"),
    "resume": ("never", "auto", "overwrite"),
}


def check_recipe(cfg: DictConfig) -> None:
    """Refuse a config that ``recipes/ebft.py`` would not follow to the letter, before anything is built.

    Raises:
        ValueError: an unknown or missing key, a value of the wrong kind, or a component that does not take its arguments.
    """
    check_keys(cfg, REQUIRED + OPTIONAL, required=REQUIRED)
    validate_config(cfg)
    plain_values(cfg)  # every reference leads somewhere
    if ("max_steps" in cfg) == ("epochs" in cfg):
        raise ValueError("give either max_steps or epochs: the length of a run is stated once")
    for key in _COUNTS:
        _check_count(cfg, key, key)
    if type(cfg.seed) is not int or not 0 <= cfg.seed < 2**63:
        raise ValueError(f"seed is {cfg.seed!r}; give a whole number from 0 to 2**63 - 1")
    for key in _SWITCHES:
        if type(cfg.get(key, False)) is not bool:
            raise ValueError(f"{key} is {cfg[key]!r}; give true or false")
    for key, choices in _CHOICES.items():
        if cfg.get(key, choices[0]) not in choices:
            raise ValueError(f"{key} is {cfg[key]!r}; choose one of {', '.join(choices)}")
    clip = cfg.get("clip_grad_norm")
    if clip is not None and (type(clip) not in (int, float) or not clip > 0):
        raise ValueError(f"clip_grad_norm is {clip!r}; give a number above 0, or remove the key for no clipping")
    minutes = cfg.get("timeout_minutes", 30)
    if type(minutes) not in (int, float) or not 0 < minutes < math.inf:
        raise ValueError(f"timeout_minutes is {minutes!r}; give a number above 0")
    changes = cfg.get("resume_with_changes", ListConfig([]))
    if not isinstance(changes, ListConfig) or not all(type(key) is str for key in changes):
        raise ValueError(f"resume_with_changes is {changes!r}; list dotted keys, such as [optimizer.lr, max_steps]")
    if type(cfg.output_dir) is not str or not cfg.output_dir:
        raise ValueError(f"output_dir is {cfg.output_dir!r}; name a directory")
    if "validation" in cfg:
        keys = VALIDATION_REQUIRED + VALIDATION_OPTIONAL
        check_keys(cfg.validation, keys, required=VALIDATION_REQUIRED, path="validation")
        for key in ("every_n_steps", "batch_size"):
            _check_count(cfg.validation, key, f"validation.{key}")
    _check_components(cfg)
    copied, read = cfg.checkpointer.get("checkpoint_dir"), cfg.model.get("checkpoint_dir")
    if read is not None and copied is not None and Path(copied).resolve() != Path(read).resolve():
        raise ValueError(
            f"checkpointer.checkpoint_dir is '{copied}' and model.checkpoint_dir '{read}': what is saved takes its "
            "configuration, tokenizer and, under adapters, its base from there; set it to ${model.checkpoint_dir}"
        )
    if cfg.checkpointer.get("keep_best") is not None and "validation" not in cfg:
        raise ValueError("checkpointer.keep_best needs validation, which measures it; add the key validation")


def _check_components(cfg: DictConfig) -> None:
    """Whatever is to be built is a node that names a component; null is none, and no way to do without."""
    places = [(key, cfg[key]) for key in _COMPONENTS if key in cfg]
    if "validation" in cfg:
        keys = ("dataset", *VALIDATION_OPTIONAL)
        places += [(f"validation.{key}", cfg.validation[key]) for key in keys if key in cfg.validation]
    for path, node in places:
        if not is_component(node):
            shown = "null" if node is None else repr(node)
            raise ValueError(f"{path} is {shown}; write a mapping with a _component_, or remove the key")
    if "metric_logger" in cfg:
        nodes = cfg.metric_logger
        # They are built last, once the run owns its output directory; what is wrong with them is said before.
        for index, node in enumerate(nodes if isinstance(nodes, ListConfig) else [nodes]):
            check_component(node, f"metric_logger[{index}]" if isinstance(nodes, ListConfig) else "metric_logger")


def _check_count(cfg: DictConfig, key: str, path: str) -> None:
    value = cfg.get(key, 1)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path} is {value!r}; give a whole number of at least 1")
