"""Rows to batches: their order, their share for each rank, and how a run goes on exactly where it stopped.

An order depends on the seed and the epoch alone. What the rows hold is not known here.
"""

import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from components.data.rows import Rows, collate
from components.data.streaming import StreamedBatches, StreamedText
from components.types import Batch


class _Filled(Dataset[dict[str, Any]]):
    """``rows``, then copies of the first that count for nothing, until the ranks' shares are equal.

    Ranks must make the same number of calls, and a row that one of them repeats would count twice in a mean.
    """

    def __init__(self, rows: Rows, world_size: int) -> None:
        self._rows = rows
        self._world_size = world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._world_size) * self._world_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self._rows):
            return self._rows[index]
        row = self._rows[0]
        return {
            **row,
            "doc_ids": torch.full_like(row["doc_ids"], -1),
            "target_mask": torch.zeros_like(row["target_mask"]),
        }


def batch_loader(
    dataset: Rows, *, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world_size: int = 1
) -> StatefulDataLoader:
    """One epoch of batches for one rank; the ranks' batches together are the epoch.

    Args:
        dataset: the rows.
        batch_size: ``B``, rows of a batch on each rank.
        seed: of the order. Epoch ``e`` (``loader.sampler.set_epoch(e)``) has its own.
        shuffle: True for training: full batches only, so the last rows of an epoch's order may be left out. False for
            validation: every row once and in order, a shorter last batch, and rows that are all padding where the
            ranks' shares would differ.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: fewer rows than one batch on every rank takes, or a :class:`StreamedText`.
    """
    if isinstance(dataset, StreamedText):
        raise ValueError(
            "a StreamedText has no end, so it cannot be gone through once; use PackedText with max_rows on the same source"
        )
    global_batch_size = batch_size * world_size
    if len(dataset) < global_batch_size:
        raise ValueError(
            f"the dataset has {len(dataset)} rows, fewer than one batch of {global_batch_size} "
            f"({batch_size} on each of {world_size} processes); lower batch_size, shorten dataset.seq_len or add text"
        )
    rows: Any = dataset if shuffle else _Filled(dataset, world_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it on every torch
        return StatefulDataLoader(
            rows,
            batch_size=batch_size,
            sampler=StatefulDistributedSampler(
                rows, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=shuffle
            ),
            collate_fn=collate,
            drop_last=shuffle,
            generator=torch.Generator(),  # torch's global one would otherwise advance with every epoch begun
        )


def train_stream(
    dataset: Rows | StreamedText, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
) -> "TrainStream | StreamedBatches":
    """Batches without end for one rank, shuffled; of what is in memory or of what is streamed.

    Both have ``state_dict``, ``load_state_dict``, ``epoch`` and ``batches_per_epoch``, which only rows in memory know.

    Args:
        dataset, batch_size, seed, rank, world_size: see :func:`batch_loader`.

    Raises:
        ValueError: fewer rows than one batch on every rank takes.
    """
    if isinstance(dataset, StreamedText):
        return StreamedBatches(dataset, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
    return TrainStream(
        batch_loader(dataset, batch_size=batch_size, seed=seed, shuffle=True, rank=rank, world_size=world_size)
    )


def first_rows(dataset: Rows | StreamedText, count: int) -> list[dict[str, Any]]:
    """The first ``count`` rows, or all if there are fewer."""
    if isinstance(dataset, StreamedText):
        return list(islice(dataset, count))
    return [dataset[index] for index in range(min(len(dataset), count))]


class TrainStream:
    """Batches without end: one epoch after the other, each in its own order.

    Its state is a position in the rows' order, not in a process: the same on every rank, and good for another number of
    ranks that together take as many rows at a time.

    Args:
        loader: from :func:`batch_loader`, with ``shuffle``.

    Attributes:
        epoch: the one that the last batch came from, from 0.
    """

    def __init__(self, loader: StatefulDataLoader) -> None:
        self.epoch = 0
        self._loader = loader
        self._drawn = 0  # batches of this epoch
        self._batches: Iterator[Batch] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Full batches on each rank."""
        return len(self._loader)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if self._drawn == len(self._loader):
            self.epoch, self._drawn, self._batches = self.epoch + 1, 0, None
        if self._batches is None:
            self._loader.sampler.set_epoch(self.epoch)
            self._loader.sampler.load_state_dict({"yielded": self._drawn * self._loader.batch_size})
            self._batches = iter(self._loader)
        self._drawn += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands (plain numbers and strings), and in what."""
        return {"epoch": self.epoch, "batches": self._drawn, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: it belongs to other data, another seed or another number of rows at a time.
        """
        for key, here in self._identity().items():
            if state[key] != here:
                raise ValueError(
                    f"the data stream to resume has {key} {state[key]}, this run has {here}; make them equal (dataset, "
                    "tokenizer, seed, batch_size x processes) or start a new run"
                )
        self.epoch, self._drawn, self._batches = state["epoch"], state["batches"], None

    def _identity(self) -> dict[str, Any]:
        sampler = self._loader.sampler
        return {
            "fingerprint": self._loader.dataset.fingerprint,
            "global_batch_size": self._loader.batch_size * sampler.num_replicas,
            "seed": sampler.seed,
        }
