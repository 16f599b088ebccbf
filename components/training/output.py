"""The output directory of a run: how it is taken, and what listens to the run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from components.training.distributed import is_main
from components.training.instantiate import instantiate
from components.training.kinds import MetricLogger


@contextmanager
def taken(output_dir: Path, *, overwrite: bool) -> Iterator[None]:
    """Make ``output_dir`` this run's. What stands in its place is removed only once the block has ended well; else it is back.

    For all ranks to call; rank 0 does it.

    Args:
        output_dir: made if it is not there.
        overwrite: replace what is in it.

    Raises:
        ValueError: it cannot be replaced.
    """
    if not is_main():
        yield
        return
    aside = output_dir.with_name(f".{output_dir.name}.replaced")
    replaces = overwrite and output_dir.is_dir()
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)
        try:
            output_dir.rename(aside)
        except OSError as error:
            raise ValueError(
                f"output_dir '{output_dir}' cannot be replaced ({error}); empty it, or name another"
            ) from error
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if replaces:
            shutil.rmtree(output_dir, ignore_errors=True)
            aside.rename(output_dir)
        raise
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)


def build_loggers(cfg: DictConfig) -> list[Any]:
    """The metric loggers that a config names, one or a list, on rank 0; elsewhere none.

    Raises:
        ValueError: see :func:`instantiate`.
    """
    nodes = cfg.get("metric_logger", ListConfig([]))
    if not is_main():
        return []
    if not isinstance(nodes, ListConfig):
        return [instantiate(nodes, path="metric_logger", kind=MetricLogger)]
    return [instantiate(node, path=f"metric_logger[{i}]", kind=MetricLogger) for i, node in enumerate(nodes)]
