"""What recipes share: configuration, processes, checkpoints, schedules, metrics."""

from components.training.checkpoint import HFCheckpointer, list_checkpoints
from components.training.config import check_keys, diff_configs, load_config, parse_args, save_config
from components.training.distributed import (
    clip_grad_norm,
    gather,
    is_main,
    seed_everything,
    shard,
    start,
    stop,
    sync_gradients,
    total,
)
from components.training.instantiate import accepts, instantiate, validate_config
from components.training.memory import keep_freed_memory, peak_memory_gib
from components.training.messages import say, timed
from components.training.metrics import MetricsLog, StepMetrics, read_metrics
from components.training.schedules import warmup_then
from components.training.schema import check_recipe
from components.training.watchdog import fail, phase, phases

__all__ = [
    "HFCheckpointer",
    "MetricsLog",
    "StepMetrics",
    "accepts",
    "check_keys",
    "check_recipe",
    "clip_grad_norm",
    "diff_configs",
    "fail",
    "gather",
    "instantiate",
    "is_main",
    "keep_freed_memory",
    "list_checkpoints",
    "load_config",
    "parse_args",
    "peak_memory_gib",
    "phase",
    "phases",
    "read_metrics",
    "save_config",
    "say",
    "seed_everything",
    "shard",
    "start",
    "stop",
    "sync_gradients",
    "timed",
    "total",
    "validate_config",
    "warmup_then",
]
