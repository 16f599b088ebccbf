"""Which records are trained on and which are held out."""

import hashlib
from typing import Any, Literal

import datasets
from torchtune.utils import get_logger, log_rank_zero

from components.data.sources import check_column


def split_by_group(
    source: datasets.Dataset | datasets.IterableDataset,
    *,
    part: Literal["train", "validation"],
    column: str = "group",
    fraction: float = 0.1,
    seed: int = 0,
) -> Any:
    """One part of a source whose groups stay together: records of one module or page are too alike to be held out from.

    A group's part depends on its name and the seed alone, so that other records move no group, and two nodes with equal
    arguments but ``part`` share the source between them.

    Args:
        source: records; a stream is filtered as it is read.
        part: which of the two.
        column: what a record is grouped by; its text is hashed.
        fraction: share of the groups that are held out, on average.
        seed: of the hash.

    Returns:
        A dataset of the same kind, in the same order.

    Raises:
        ValueError: ``fraction`` not between 0 and 1, no such column, a record without a group, or a part without records.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; give the share of groups to hold out, between 0 and 1")
    if part not in ("train", "validation"):
        raise ValueError(f"part is {part!r}; choose 'train' or 'validation'")
    if source.column_names is not None:  # unknown of some streams
        check_column(source.column_names, column)
    wanted = part == "validation"
    kept = source.filter(lambda group: _is_held_out(group, column, fraction, seed) == wanted, input_columns=column)
    if isinstance(kept, datasets.Dataset):
        if not len(kept):
            raise ValueError(
                f"no group of column {column!r} falls into {part!r} (fraction {fraction}); set another fraction or seed"
            )
        groups = len(set(kept[column]))
        log_rank_zero(
            get_logger("INFO"), f"{part}: {len(kept)} of {len(source)} records, {groups} groups of {column!r}"
        )
    return kept


def _is_held_out(group: Any, column: str, fraction: float, seed: int) -> bool:
    if group is None:
        raise ValueError(f"a record has no {column!r} to split by; fill the column, or name another")
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
