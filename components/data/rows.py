"""What a dataset gives: rows of one length, a batch of them, and a hash of all they hold."""

import hashlib
import json
from typing import Any, Protocol

import torch

from components.types import Batch


class Rows(Protocol):
    """A dataset to train on: rows of one length, and a hash of all they hold. :class:`PackedText` is one.

    A row has ``tokens`` and ``doc_ids`` ``[L]`` long and ``target_mask`` ``[L]`` bool. All of them may have a ``record``, the
    source row, for verifiers, and a ``group`` (str), without which they count as independent (see :class:`Batch`).
    """

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def collate(rows: list[dict[str, Any]]) -> Batch:
    """One batch of ``B`` rows, with their records and groups if they have any."""
    return Batch(
        tokens=torch.stack([row["tokens"] for row in rows]),
        doc_ids=torch.stack([row["doc_ids"] for row in rows]),
        target_mask=torch.stack([row["target_mask"] for row in rows]),
        records=[row["record"] for row in rows] if "record" in rows[0] else None,
        groups=[row["group"] for row in rows] if "group" in rows[0] else None,
    )


def hash_rows(dataset: Any) -> str:
    """SHA-256, in hex, of all rows: equal only for the same data and records, cut and masked in the same way; groups do not
    count."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        row = dataset[index]
        for key in ("tokens", "doc_ids", "target_mask"):
            digest.update(row[key].numpy().tobytes())
        if "record" in row:
            digest.update(json.dumps(row["record"], sort_keys=True, default=str).encode())
    return digest.hexdigest()
