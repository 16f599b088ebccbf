"""Records with a prompt and a completion, or chats: rows that are learned from only where the model is to speak.

Prompt and completion are tokenised apart. The tokens of a prompt then never depend on what follows it, and a row begins with
exactly what a policy that is to complete the prompt is given; ``CompletionAnchor`` finds that place as the first token
learned from.
"""

import string
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import datasets
import torch
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchtune.utils import get_logger, log_rank_zero

from components.data.chat import ChatTemplate, Turn
from components.data.packing import encode_all
from components.data.rows import hash_rows
from components.data.sources import check_column
from components.data.tokenizer import Tokenizer

_RECORDS_AT_ONCE = 256


class PromptCompletion(Dataset[dict[str, Any]]):
    """Rows of ``seq_len`` tokens, each a prompt and its completion, padded on the right (``pad_id``, document -1).

    The completion and the EOS token behind it are learned from. Of a chat it is the assistant's replies, each through the
    end token of its turn. A row carries its ``record``, the source row, and the record's ``group`` if there is that column (of
    several in a row, the longest's).

    Args:
        tokenizer: see :class:`Tokenizer`; for chats one with a ``chat_template``.
        source: records, as :func:`load_records` returns them.
        seq_len: ``L``, tokens of a row.
        prompt_column: holds the prompt.
        completion_column: holds the completion.
        template: the prompt as a text that names columns in braces, such as ``"{question}\\n"``; ``{{`` is a brace.
        chat: prompt and completion are a user's message and the reply, written by the checkpoint's own chat template.
        messages_column: holds whole chats instead, lists of ``role`` and ``content`` that end with the assistant.
        system: begins every chat that has no system message of its own.
        learn_from: the ``"last"`` reply of a chat, or ``"all"``.
        add_bos: begin with the BOS token; a chat template writes its own.
        add_eos: end a completion with the EOS token; a chat always ends with its last turn's end token.
        too_long: what becomes of a record of more than ``seq_len`` tokens: ``"drop"`` it, ``"truncate"`` the completion, or
            raise an ``"error"``. One whose prompt alone fills the row is dropped in either case.
        packed: put several records in a row, each a document of its own, in their order, a new row whenever the next does
            not fit. Rows then carry no record.
        max_rows: make no more rows than this, the first, and stop reading there.

    Raises:
        ValueError: a source that is a stream, options that exclude each other, a column that is not there, a record without
            text, a chat that the template refuses, a record that is too long with ``too_long="error"``, or no record left.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        source: datasets.Dataset,
        seq_len: int,
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        template: str | None = None,
        chat: bool = False,
        messages_column: str | None = None,
        system: str | None = None,
        learn_from: Literal["last", "all"] = "last",
        add_bos: bool = False,
        add_eos: bool = True,
        too_long: Literal["drop", "truncate", "error"] = "drop",
        packed: bool = False,
        max_rows: int | None = None,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; predicting a token from another takes at least 2")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; keep at least 1 row, or leave it out for all")
        if not isinstance(source, datasets.Dataset):
            raise ValueError(
                "source is a stream, and PromptCompletion reads no streams; use components.data.load_records, with max_records "
                "and streaming if they are too many for memory"
            )
        chat = chat or messages_column is not None
        if add_bos and chat:
            raise ValueError("add_bos is true, but the chat template writes what begins a chat; remove add_bos")
        if unasked := tokenizer.encode("", add_bos=False, add_eos=False):
            raise ValueError(
                f"the tokenizer adds {unasked} to every text, and would between prompt and completion; use "
                "components.data.load_tokenizer"
            )
        turns = _Turns(
            source.column_names,
            prompt_column=prompt_column,
            completion_column=completion_column,
            template=template,
            messages_column=messages_column,
            system=system,
            learn_from=learn_from,
            chat_template=_chat_template(tokenizer) if chat else None,
        )
        self.seq_len = seq_len
        self._source = source
        self._pad_id = tokenizer.pad_id
        self._packed = packed
        self._tokens, self._learned = array("i"), array("b")
        self._ends = [0]  # of the records kept, in tokens
        self._kept: list[int] = []  # their numbers in the source
        read = cut = dropped = untargeted = 0
        for number, tokens, learned in _tokenize(
            tokenizer, source, turns, add_bos=add_bos, add_eos=add_eos and not chat
        ):
            read += 1
            if len(tokens) > seq_len and too_long == "error":
                raise ValueError(
                    f"record {number} of dataset.source has {len(tokens)} tokens, seq_len is {seq_len}; lengthen it, or "
                    "set too_long to drop or truncate"
                )
            if len(tokens) > seq_len and too_long == "drop":
                dropped += 1
                continue
            if not any(learned[:seq_len]):
                untargeted += 1
                continue
            cut += len(tokens) > seq_len
            self._tokens.extend(tokens[:seq_len])
            self._learned.extend(learned[:seq_len])
            self._ends.append(len(self._tokens))
            self._kept.append(number)
            filled = len(self._tokens) // seq_len if packed else len(self._kept)
            if max_rows is not None and filled >= max_rows:
                break
        if not self._kept:
            raise ValueError(
                f"of {read} records of dataset.source none is left: {dropped} are longer than seq_len {seq_len}, of "
                f"{untargeted} no token is learned from; lengthen seq_len or look at the completions"
            )
        self._first = _in_order(self._ends, seq_len) if packed else list(range(len(self._kept) + 1))
        if max_rows is not None:
            del self._first[max_rows + 1 :]
        total = self._ends[self._first[-1]]
        log_rank_zero(
            get_logger("INFO"),
            f"{read} of {len(source)} records read: {self._first[-1]} in {len(self)} rows of {seq_len}, {dropped} dropped as "
            f"too long, {untargeted} for want of a token to learn from, {cut} truncated; {total} tokens, "
            f"{sum(self._learned[:total]) / total:.0%} learned from; fingerprint {self.fingerprint[:12]}",
        )

    def __len__(self) -> int:
        return len(self._first) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``: ``tokens`` and ``doc_ids`` ``[L]`` long, ``target_mask`` ``[L]`` bool; with ``group`` and ``record``
        as the class says."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        records = range(self._first[index], self._first[index + 1])
        start, stop = self._ends[records.start], self._ends[records.stop]
        lengths = torch.tensor([self._ends[record + 1] - self._ends[record] for record in records])
        padding = (0, self.seq_len - (stop - start))
        tokens = torch.tensor(self._tokens[start:stop], dtype=torch.long)
        learned = torch.tensor(self._learned[start:stop], dtype=torch.bool)
        row: dict[str, Any] = {
            "tokens": pad(tokens, padding, value=self._pad_id),
            "doc_ids": pad(torch.arange(len(records)).repeat_interleave(lengths), padding, value=-1),
            "target_mask": pad(learned, padding, value=False),
        }
        if "group" in self._source.column_names:
            number = self._kept[records[int(lengths.argmax())]]
            group = self._source[number]["group"]
            row["group"] = f"record {number}" if group is None else str(group)
        return row if self._packed else row | {"record": self._source[self._kept[records.start]]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that the rows hold, records included."""
        return hash_rows(self)


class _Turns:
    """Cuts a record into prompts and replies: of its columns, or of a chat."""

    def __init__(
        self,
        columns: Sequence[str],
        *,
        prompt_column: str,
        completion_column: str,
        template: str | None,
        messages_column: str | None,
        system: str | None,
        learn_from: Literal["last", "all"],
        chat_template: ChatTemplate | None,
    ) -> None:
        if system is not None and chat_template is None:
            raise ValueError("system is a message of a chat; set chat: true, or write it into template")
        if template is not None and messages_column is not None:
            raise ValueError("template makes a prompt of columns, messages_column holds whole chats; remove one")
        self._prompt = _fields("{" + prompt_column + "}" if template is None else template)
        self._completion = completion_column
        self._messages = messages_column
        self._system = system
        self._learn_from = learn_from
        self._chat_template = chat_template
        read = [name for _, name in self._prompt if name] + [completion_column]
        for column in read if messages_column is None else [messages_column]:
            check_column(columns, column)

    def __call__(self, record: dict[str, Any]) -> list[Turn]:
        if self._messages is not None:
            messages = [_without_nulls(message) for message in record[self._messages] or ()]
        else:
            prompt = "".join(text + (_text(record, name) if name else "") for text, name in self._prompt)
            completion = _text(record, self._completion)
            if self._chat_template is None:
                return [Turn(prompt=prompt, reply=completion)]
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        if self._system is not None and (not messages or messages[0].get("role") != "system"):
            messages.insert(0, {"role": "system", "content": self._system})
        assert self._chat_template is not None
        return self._chat_template.turns(messages, learn_from=self._learn_from)


def _tokenize(
    tokenizer: Tokenizer, source: datasets.Dataset, turns: _Turns, *, add_bos: bool, add_eos: bool
) -> Iterator[tuple[int, list[int], list[bool]]]:
    """Number, tokens and which of them are learned from, of every record."""
    for first in range(0, len(source), _RECORDS_AT_ONCE):
        records: list[list[Turn]] = []
        for number in range(first, min(first + _RECORDS_AT_ONCE, len(source))):
            try:
                records.append(turns(source[number]))
            except ValueError as error:
                raise ValueError(f"record {number} of dataset.source: {error}") from error
        pieces = [turn for record in records for turn in record]
        prompts = encode_all(tokenizer, [turn.prompt for turn in pieces], add_bos=add_bos)
        replies = encode_all(tokenizer, [turn.reply for turn in pieces], add_eos=add_eos)
        encoded = zip(prompts, replies, strict=True)
        for number, record in enumerate(records, start=first):
            tokens: list[int] = []
            learned: list[bool] = []
            for prompt, reply in islice(encoded, len(record)):
                tokens += prompt + reply
                learned += [False] * len(prompt) + [True] * len(reply)
            yield number, tokens, learned


def _chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    found = getattr(tokenizer, "chat_template", None)
    if found is None:
        raise ValueError(
            "the tokenizer has no chat template; put chat_template.jinja beside its tokenizer.json, or set chat: false"
        )
    return found


def _fields(template: str) -> list[tuple[str, str | None]]:
    """A template as pairs of a text and the column behind it."""
    remedy = "name columns as {column}, and write {{ and }} for braces"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r} cannot be read ({error}); {remedy}") from error
    if any(name == "" or form or conversion for _, name, form, conversion in parts):
        raise ValueError(f"template {template!r} names no column, or asks for a format; {remedy}")
    return [(text, name) for text, name, _, _ in parts]


def _text(record: dict[str, Any], column: str) -> str:
    value = record[column]
    if not isinstance(value, str | int | float):
        raise ValueError(f"column {column!r} holds {value!r}, not text; leave such records out, or name another column")
    return str(value)


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """``datasets`` gives every message all the keys that any message has; templates ask which are there."""
    return {key: value for key, value in message.items() if value is not None}


def _in_order(ends: Sequence[int], seq_len: int) -> list[int]:
    """Which record each row begins with (and, last, their number), if a new row begins when the next does not fit."""
    first = [0]
    for record in range(len(ends) - 1):
        if ends[record + 1] - ends[first[-1]] > seq_len:
            first.append(record)
    return [*first, len(ends) - 1]
