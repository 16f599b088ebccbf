"""What recipes share: configuration, processes, checkpoints, schedules, metrics."""

from components.training.checkpoint import CheckpointError, HFCheckpointer
from components.training.config import (
    check_keys,
    diff_configs,
    load_config,
    naming_file,
    parse_args,
    plain_values,
    save_config,
    written_out,
)
from components.training.distributed import (
    clip_grad_norm,
    gather,
    is_main,
    rng_state,
    seed_everything,
    set_rng_state,
    shard,
    start,
    stop,
    sync_gradients,
    total,
)
from components.training.instantiate import accepts, instantiate, validate_config
from components.training.interrupt import Interrupt, resume_command
from components.training.kinds import Checkpointer, MetricLogger, Optimizer, Scheduler
from components.training.manifest import Manifest, list_checkpoints, newest_checkpoint
from components.training.memory import keep_freed_memory, peak_memory_gib
from components.training.messages import say, say_warnings_once, timed
from components.training.metrics import MetricsLog, StepMetrics, read_metrics
from components.training.output import build_loggers, taken
from components.training.parts import Measuring, Parts, build_parts
from components.training.placement import place
from components.training.preflight import check_parts
from components.training.progress import Progress, Trend, terminal
from components.training.rehearsal import build_scheduler, rehearse
from components.training.resuming import Checkpoint, check_frozen, find_checkpoint, frozen_weights
from components.training.samples import (
    KeptBlock,
    KeptSample,
    KeptText,
    forget_rollouts,
    load_rollouts,
    save_rollouts,
    token_texts,
)
from components.training.schedules import warmup_then
from components.training.schema import check_recipe
from components.training.watchdog import fail, phase, phases

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "HFCheckpointer",
    "Interrupt",
    "KeptBlock",
    "KeptSample",
    "KeptText",
    "Manifest",
    "Measuring",
    "MetricLogger",
    "MetricsLog",
    "Optimizer",
    "Parts",
    "Progress",
    "Scheduler",
    "StepMetrics",
    "Trend",
    "accepts",
    "build_loggers",
    "build_parts",
    "build_scheduler",
    "check_frozen",
    "check_keys",
    "check_parts",
    "check_recipe",
    "clip_grad_norm",
    "diff_configs",
    "fail",
    "find_checkpoint",
    "forget_rollouts",
    "frozen_weights",
    "gather",
    "instantiate",
    "is_main",
    "keep_freed_memory",
    "list_checkpoints",
    "load_config",
    "load_rollouts",
    "naming_file",
    "newest_checkpoint",
    "parse_args",
    "peak_memory_gib",
    "phase",
    "phases",
    "place",
    "plain_values",
    "read_metrics",
    "rehearse",
    "resume_command",
    "rng_state",
    "save_config",
    "save_rollouts",
    "say",
    "say_warnings_once",
    "seed_everything",
    "set_rng_state",
    "shard",
    "start",
    "stop",
    "sync_gradients",
    "taken",
    "terminal",
    "timed",
    "token_texts",
    "total",
    "validate_config",
    "warmup_then",
    "written_out",
]
