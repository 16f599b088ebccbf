"""Documents laid end to end and cut into rows of one length, which is how raw text is trained on.

What makes one document differ from the next (``Batch.doc_ids``) is decided here; who may see whom because of it is
decided in ``components.blocks``.
"""

from array import array
from functools import cached_property
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchtune.utils import get_logger, log_rank_zero

from components.data.rows import hash_rows
from components.data.tokenizer import Tokenizer

_DOCUMENTS_AT_ONCE = 256


class PackedText(Dataset[dict[str, Any]]):
    """Rows of exactly ``seq_len`` tokens, cut from all documents in their order.

    A document that a row's end cuts goes on in the next row. Documents of a row are numbered 0, 1, 2... from its start.
    Every token is learned from. The tokens after the last full row are dropped: a row of mostly padding costs as much
    as any other and teaches less. Only a corpus shorter than one row is padded to one (``pad_id``, document -1, not
    learned from). A row's ``group`` is that of the document that most of its tokens are of.

    Args:
        tokenizer: see :class:`Tokenizer`; one that has ``encode_batch`` is much faster.
        source: documents in a column ``text``, as :func:`load_text` returns them; one that has nothing in a column ``group`` is
            a group of its own. With ``max_rows`` also a stream.
        seq_len: ``L``, tokens of a row.
        add_bos: begin every document with the BOS token.
        add_eos: end every document with the EOS token.
        isolate_documents: False lets documents flow into one another: a row is then one document, number 0.
        max_rows: make no more rows than this: of a dataset evenly spaced over all of it, so that few rows come from many
            documents; of a stream the first, and it is read no further.

    Raises:
        ValueError: ``seq_len`` below 2, or no tokens.
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        source: datasets.Dataset | datasets.IterableDataset,
        seq_len: int,
        add_bos: bool = False,
        add_eos: bool = True,
        isolate_documents: bool = True,
        max_rows: int | None = None,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len is {seq_len}; predicting a token from another takes at least 2")
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; keep at least 1 row, or leave it out for all")
        indexable = isinstance(source, datasets.Dataset)
        limit = None if indexable or max_rows is None else max_rows * seq_len
        tokens, ends, groups = _tokenize(tokenizer, source, add_bos=add_bos, add_eos=add_eos, limit=limit)
        if not len(tokens):
            raise ValueError("the documents of dataset.source hold no tokens; give it text")
        self.seq_len = seq_len
        self._isolate_documents = isolate_documents
        self._pad_id = tokenizer.pad_id
        full = max(1, len(tokens) // seq_len)
        kept = min(full, max_rows or full)
        self._rows = [row * full // kept for row in range(kept)] if indexable else list(range(kept))
        self._tokens = tokens
        self._ends = ends  # position in the corpus after each document's last token, ascending
        self._groups = groups
        log_rank_zero(
            get_logger("INFO"),
            f"packed {len(ends)} documents, {len(tokens)} tokens, into {full} rows of {seq_len} and took {kept} of them; "
            f"fingerprint {self.fingerprint[:12]}",
        )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row ``index``: ``tokens`` and ``doc_ids`` ``[L]`` long, ``target_mask`` ``[L]`` bool, and its ``group``."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self._rows[index]
        row = cut_row(
            self._tokens,
            self._ends,
            number,
            seq_len=self.seq_len,
            pad_id=self._pad_id,
            isolate_documents=self._isolate_documents,
        )
        return {**row, "group": self._groups[_main_document(self._ends, number, self.seq_len, len(self._tokens))]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that the rows hold: equal only for the same data, cut and masked in the same way."""
        return hash_rows(self)


def cut_row(
    tokens: Tensor, ends: Tensor, index: int, *, seq_len: int, pad_id: int, isolate_documents: bool
) -> dict[str, Tensor]:
    """Row ``index`` of documents laid end to end: ``tokens``, and the ascending positions ``ends`` behind each."""
    row = tokens[index * seq_len :][:seq_len].long()
    if isolate_documents:
        documents = torch.searchsorted(ends, index * seq_len + torch.arange(len(row)), right=True)
        doc_ids = documents - documents[0]
    else:
        doc_ids = torch.zeros_like(row)
    padding = (0, seq_len - len(row))
    doc_ids = torch.nn.functional.pad(doc_ids, padding, value=-1)
    return {
        "tokens": torch.nn.functional.pad(row, padding, value=pad_id),
        "doc_ids": doc_ids,
        "target_mask": doc_ids >= 0,
    }


def _main_document(ends: Tensor, index: int, seq_len: int, total: int) -> int:
    """The document that most tokens of row ``index`` are of, the first of equals."""
    positions = torch.arange(index * seq_len, min((index + 1) * seq_len, total))
    documents, counts = torch.searchsorted(ends, positions, right=True).unique_consecutive(return_counts=True)
    return int(documents[counts.argmax()])


def encode_all(
    tokenizer: Tokenizer, texts: list[str], *, add_bos: bool = False, add_eos: bool = False
) -> list[list[int]]:
    """Tokens of each text; torchtune's tokenizers have no ``encode_batch``."""
    if hasattr(tokenizer, "encode_batch"):
        return tokenizer.encode_batch(texts, add_bos=add_bos, add_eos=add_eos)
    return [tokenizer.encode(text, add_bos=add_bos, add_eos=add_eos) for text in texts]


def _tokenize(
    tokenizer: Tokenizer,
    source: datasets.Dataset | datasets.IterableDataset,
    *,
    add_bos: bool,
    add_eos: bool,
    limit: int | None,
) -> tuple[Tensor, Tensor, list[str]]:
    """All tokens (int32), where each document ends (long) and its group, of as many documents as reach ``limit`` tokens."""
    tokens, ends = array("i"), array("q")
    groups: list[str] = []
    for batch in source.iter(batch_size=_DOCUMENTS_AT_ONCE):
        texts = batch["text"]
        encoded = encode_all(tokenizer, texts, add_bos=add_bos, add_eos=add_eos)
        for document, group in zip(encoded, batch.get("group") or [None] * len(texts), strict=True):
            if document:
                tokens.extend(document)
                ends.append(len(tokens))
                groups.append(f"document {len(groups)}" if group is None else str(group))
        if limit is not None and len(tokens) >= limit:
            break
    if not tokens:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.long), groups
    return torch.frombuffer(tokens, dtype=torch.int32), torch.frombuffer(ends, dtype=torch.long), groups
