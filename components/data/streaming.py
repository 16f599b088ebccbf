"""A corpus that does not fit in memory, read as it is trained on: the rows of :class:`PackedText`, a window at a time.

A window is so many consecutive rows, shuffled among themselves. Where it begins in the corpus is a few numbers, so that a
run goes on exactly by reading one window again. Every rank reads all of it and takes its rows in turn, as it does of a corpus
in memory: what a step sees does not depend on the number of ranks, for the price of tokenising on each.
"""

import copy
import hashlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torchtune.utils import get_logger, log_rank_zero

from components.data.packing import cut_row, encode_all
from components.data.rows import collate
from components.data.tokenizer import Tokenizer
from components.types import Batch

_CHARACTERS_AT_ONCE = 2**18  # read and tokenised together; to go on, some of it is read again
_ROWS_HASHED = 64


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a window begins.

    Attributes:
        epoch: how often the corpus was read before.
        window: how many windows of this epoch were.
        source: ``state_dict`` of the source before the documents that the window's first token was read with; None at the
            beginning.
        skip: how many tokens of those documents earlier windows have.
        read: SHA-256, in hex, of all that was read before; "" at the beginning of the run.
    """

    epoch: int = 0
    window: int = 0
    source: dict[str, Any] | None = None
    skip: int = 0
    read: str = ""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Consecutive rows: their ``tokens`` (int32), the positions ``ends`` behind documents, and the hash through here."""

    place: Place
    tokens: Tensor
    ends: Tensor
    read: str


class StreamedText:
    """The rows of :class:`PackedText`, made while they are asked for.

    An epoch is the same rows; they are shuffled in windows of ``shuffle_rows``, and what is left of the corpus behind its
    last full row is dropped. For training only: validation takes ``PackedText`` with ``max_rows`` over the same source.

    Args:
        tokenizer: see :class:`Tokenizer`.
        source: documents in a column ``text``, as :func:`stream_text` returns them.
        seq_len: ``L``, tokens of a row.
        shuffle_rows: rows of a window, which are held in memory (4 bytes a token); 1 leaves the order of the corpus. A corpus
            that is sorted, say by language, wants its files shuffled beforehand.
        add_bos, add_eos, isolate_documents: as of :class:`PackedText`.

    Raises:
        ValueError: ``seq_len`` below 2, ``shuffle_rows`` below 1, a source that is no stream, or (when read) less text than
            one row.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        source: datasets.IterableDataset,
        seq_len: int,
        shuffle_rows: int = 1000,
        add_bos: bool = False,
        add_eos: bool = True,
        isolate_documents: bool = True,
    ) -> None:
        if not isinstance(source, datasets.IterableDataset):
            raise ValueError(
                "source is no stream; use components.data.stream_text, or PackedText for what fits in memory"
            )
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; predicting a token from another takes at least 2")
        if shuffle_rows < 1:
            raise ValueError(f"shuffle_rows is {shuffle_rows}; give at least 1, which does not shuffle")
        self.seq_len = seq_len
        self.shuffle_rows = shuffle_rows
        self._tokenizer = tokenizer
        self._source = source
        self._add_bos, self._add_eos = add_bos, add_eos
        self._isolate_documents = isolate_documents

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the first 64 rows and of how windows are made: all that is known without reading on."""
        first = list(islice(self, _ROWS_HASHED))
        if not first:
            raise ValueError(f"dataset.source holds less text than one row of {self.seq_len} tokens; give it more")
        digest = hashlib.sha256(f"{self.shuffle_rows}".encode())
        for row in first:
            for value in row.values():
                digest.update(value.numpy().tobytes())
        log_rank_zero(
            get_logger("INFO"),
            f"streaming rows of {self.seq_len}, shuffled {self.shuffle_rows} at a time; fingerprint of the first {len(first)}: "
            f"{digest.hexdigest()[:12]}",
        )
        return digest.hexdigest()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Rows of one epoch, in the order of the corpus."""
        for window in self._epoch(Place(), _ROWS_HASHED):
            for index in range(len(window.tokens) // self.seq_len):
                yield self.row(window, index)

    def row(self, window: Window, index: int) -> dict[str, Tensor]:
        """``tokens`` and ``doc_ids`` ``[L]`` long, ``target_mask`` ``[L]`` bool; there is no padding."""
        return cut_row(
            window.tokens,
            window.ends,
            index,
            seq_len=self.seq_len,
            pad_id=self._tokenizer.pad_id,
            isolate_documents=self._isolate_documents,
        )

    def windows(self, place: Place) -> Iterator[Window]:
        """Windows without end, from ``place`` on.

        Raises:
            ValueError: the corpus ends before ``place``.
        """
        while True:
            window: Window | None = None
            for window in self._epoch(place, self.shuffle_rows):
                yield window
            if window is None:
                raise ValueError(
                    "the corpus ends before where the data stream to resume stands; restore its files or start a new run"
                )
            place = Place(epoch=place.epoch + 1, read=window.read)

    def _epoch(self, place: Place, rows: int) -> Iterator[Window]:
        """Windows of ``rows`` rows from ``place`` to the end of its epoch."""
        source = copy.deepcopy(self._source)  # reading changes it
        if place.source is not None:
            source.load_state_dict(place.source)
        documents = iter(source)
        tokens, ends = array("i"), array("q")
        # What was read together: the source's state before, and at which of `tokens` it begins.
        reads = deque([(place.source, -place.skip)])
        full = rows * self.seq_len
        number, read, skip, more = place.window, place.read, place.skip, True
        while True:
            while more and len(tokens) < full:
                texts = _some(documents)
                more = bool(texts)
                encoded = encode_all(self._tokenizer, texts, add_bos=self._add_bos, add_eos=self._add_eos)
                for document in filter(None, encoded):
                    tokens.extend(document)
                    ends.append(len(tokens))
                if skip:
                    tokens, ends, skip = tokens[skip:], _behind(ends, skip), 0
                reads.append((source.state_dict(), len(tokens)))
            size = min(len(tokens), full) // self.seq_len * self.seq_len
            if not size:
                return
            while len(reads) > 1 and reads[1][1] <= 0:
                reads.popleft()
            state, begin = reads[0]
            here = Place(epoch=place.epoch, window=number, source=state, skip=-begin, read=read)
            inside = ends[: bisect_right(ends, size)]
            read = hashlib.sha256(read.encode() + tokens[:size].tobytes() + inside.tobytes()).hexdigest()
            yield Window(
                place=here,
                tokens=torch.tensor(tokens[:size], dtype=torch.int32),
                ends=torch.tensor(inside, dtype=torch.long),
                read=read,
            )
            tokens, ends = tokens[size:], _behind(ends, size)
            reads = deque((state, begin - size) for state, begin in reads)
            number += 1


def _some(documents: Iterator[dict[str, Any]]) -> list[str]:
    """The next texts, none at the end."""
    texts, characters = [], 0
    for document in documents:
        texts.append(document["text"])
        characters += len(texts[-1])
        if characters >= _CHARACTERS_AT_ONCE:
            break
    return texts


def _behind(ends: array, size: int) -> array:
    """Positions of what is left when the first ``size`` tokens are gone."""
    return array("q", (end - size for end in ends[bisect_right(ends, size) :]))


class StreamedBatches:
    """Batches without end from a :class:`StreamedText`, as :class:`TrainStream` gives them of rows in memory.

    Epochs follow one another without a gap: a batch may hold the last rows of one and the first of the next. The state is a
    position in the corpus, the same on every rank, and good for another number of ranks that together take as many rows.

    Args:
        dataset: what is read.
        batch_size: ``B``, rows of a batch on each rank.
        seed: of the order in each window.
        rank: of this process.
        world_size: number of processes.

    Attributes:
        epoch: the one that the last row came from, from 0.
    """

    def __init__(
        self, dataset: StreamedText, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.epoch = 0
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._identity = {
            "fingerprint": dataset.fingerprint,
            "global_batch_size": batch_size * world_size,
            "seed": seed,
        }
        self._windows = dataset.windows(Place())
        self._window: Window | None = None
        self._order: list[int] = []
        self._taken = 0  # rows of the window

    @property
    def batches_per_epoch(self) -> int:
        """Not known of a stream.

        Raises:
            ValueError: always.
        """
        raise ValueError("how long an epoch of a streamed corpus is, is not known; give max_steps instead of epochs")

    def __iter__(self) -> "StreamedBatches":
        return self

    def __next__(self) -> Batch:
        rows = []
        for number in range(self._batch_size * self._world_size):
            window = self._current()
            index = self._order[self._taken]
            self._taken += 1
            self.epoch = window.place.epoch
            if number % self._world_size == self._rank:
                rows.append(self._dataset.row(window, index))
        return collate(rows)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands (plain numbers and strings), in what, and a hash of all that was read."""
        window = self._current()
        at = {"place": dict(vars(window.place)), "rows": self._taken, "read": window.read}
        return {"epoch": self.epoch, **at, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: it belongs to other data, another seed or another number of rows at a time.
        """
        for key, here in self._identity.items():
            if state[key] != here:
                raise ValueError(
                    f"the data stream to resume has {key} {state[key]}, this run has {here}; make them equal (dataset, "
                    "tokenizer, seed, batch_size x processes) or start a new run"
                )
        self._windows = self._dataset.windows(Place(**state["place"]))
        window = self._open()
        if window.read != state["read"]:
            raise ValueError(
                "the corpus has changed where the data stream to resume stands; restore its files or start a new run"
            )
        self.epoch, self._taken = state["epoch"], state["rows"]

    def _current(self) -> Window:
        """The window that the next row is in."""
        if self._window is None or self._taken == len(self._order):
            return self._open()
        return self._window

    def _open(self) -> Window:
        self._window = next(self._windows)
        place, rows = self._window.place, len(self._window.tokens) // self._dataset.seq_len
        self._order = np.random.default_rng([self._seed, place.epoch, place.window]).permutation(rows).tolist()
        self._taken = 0
        return self._window
