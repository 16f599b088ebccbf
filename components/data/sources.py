"""Where texts and records come from: files here, or a dataset of the Hugging Face hub. Nothing is tokenised here."""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from torchtune.utils import get_logger, log_rank_zero

_ROW_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXT = "text"
_GROUP = "group"


class NotHere(ValueError):
    """A dataset id that the hub does not have, or that it cannot be asked for."""


def load_text(
    path: str,
    *,
    column: str = "text",
    split: str = "train",
    name: str | None = None,
    max_documents: int | None = None,
) -> datasets.Dataset:
    """Documents from files or from the hub. Blank ones are dropped, and their number is logged.

    Args:
        path: a file, a folder (searched through, without hidden files) or a glob; if nothing here has that name, a
            dataset id of the Hugging Face hub. Files ending in .jsonl, .json, .parquet or .csv hold a document per row,
            every other file is one document.
        column: which column of the rows is the text.
        split: which split of a hub dataset, or of a folder whose row files are named after splits (train.jsonl,
            validation.jsonl). Other files are all ``"train"``.
        name: which configuration of a hub dataset.
        max_documents: keep the first so many only.

    Returns:
        A dataset with the columns ``text`` and ``group``, in the order of file names and rows. What belongs together (see
        :func:`split_by_group`) is what agrees in the column ``group`` of rows; without one, every file or row is alone.

    Raises:
        ValueError: nothing there, files that cannot be read together or at all, a missing column or split, or no
            document that is not blank.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}; keep at least 1, or leave it out for all")
    documents = _select(path, _read(path, name=name, split=split), column)
    if _GROUP not in documents.column_names:
        documents = documents.add_column(_GROUP, [f"{path} row {number}" for number in range(len(documents))])
    if max_documents is not None:
        documents = documents.select(range(min(max_documents, len(documents))))
    kept = documents.filter(_not_blank, input_columns=_TEXT, batched=True)
    blank = len(documents) - len(kept)
    if not kept:
        raise ValueError(f"no text in '{path}' (blank documents: {blank}); give another path, column or split")
    log_rank_zero(get_logger("INFO"), f"{path}: {len(kept)} documents, {blank} blank ones dropped")
    return kept


def stream_text(
    path: str, *, column: str = "text", split: str = "train", name: str | None = None
) -> datasets.IterableDataset:
    """The documents of :func:`load_text`, read when they are asked for: for :class:`StreamedText`.

    ``PackedText`` with ``max_rows`` takes them too, for validation. Rows without a column ``group`` have none here.

    Args:
        path, column, split, name: see :func:`load_text`.

    Raises:
        ValueError: see :func:`load_text`; blank documents are only met, and dropped, on the way.
    """
    documents = _select(path, _read(path, name=name, split=split, streaming=True), column)
    return documents.filter(lambda text: _not_blank([text])[0], input_columns=_TEXT)


def load_records(
    path: str,
    *,
    split: str = "train",
    name: str | None = None,
    max_records: int | None = None,
    streaming: bool = False,
) -> datasets.Dataset:
    """Rows of .jsonl, .json, .parquet or .csv files, or of a hub dataset, with all their columns.

    Args:
        path, split, name: see :func:`load_text`.
        max_records: keep the first so many only.
        streaming: read no further than ``max_records``, for a dataset too large to fetch whole.

    Raises:
        ValueError: nothing there, files that cannot be read together or at all, a missing split, or no row.
    """
    if max_records is not None and max_records < 1:
        raise ValueError(f"max_records is {max_records}; keep at least 1, or leave it out for all")
    if streaming and max_records is None:
        raise ValueError("streaming is true, but all records are asked for; set max_records")
    records = _read(path, name=name, split=split, streaming=streaming)
    if streaming:
        try:
            first = list(records.take(max_records))
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"'{path}' cannot be read ({error}); check the files") from error
        records = datasets.Dataset.from_list(first, features=records.features)
    elif max_records is not None:
        records = records.select(range(min(max_records, len(records))))
    if not len(records):
        raise ValueError(f"no rows in '{path}'; give another path or split")
    log_rank_zero(get_logger("INFO"), f"{path}: {len(records)} records of {', '.join(records.column_names)}")
    return records


def check_column(columns: Sequence[str], column: str) -> None:
    """Refuse a column that records do not have, with the name that may have been meant."""
    if column not in columns:
        near = get_close_matches(column, columns, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(columns)}"
        raise ValueError(f"the records have no column {column!r}; {hint}")


def _read(path: str, *, name: str | None, split: str, streaming: bool = False) -> Any:
    """Rows as they are, a ``datasets.Dataset`` or (``streaming``) ``IterableDataset``; of text files with one column."""
    files = _files(path)
    if not files:
        return _from_hub(path, name, split, streaming=streaming)
    if name is not None:
        raise ValueError(f"name {name!r} is a configuration of a hub dataset, but '{path}' is here; leave name out")
    if (kind := _kind(path, files)) == _TEXT:
        return _from_text_files(path, files, split, streaming=streaming)
    return _from_row_files(path, files, kind, split, streaming=streaming)


def _files(path: str) -> list[str]:
    """The files that ``path`` names, sorted; none if it is not local."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [str(place / file) for file in glob.glob("**", root_dir=place, recursive=True)]
    elif place.is_file():
        return [str(place)]
    else:
        found = glob.glob(str(place), recursive=True)
    files = sorted(file for file in found if Path(file).is_file())
    if place.is_dir() and not files:
        raise ValueError(f"folder '{path}' holds no files; give a path with text in it")
    return files


def _kind(path: str, files: list[str]) -> str:
    """How to read ``files``: as text, or the name of the ``datasets`` builder for their rows."""
    kinds = Counter(_ROW_FILES.get(Path(file).suffix, _TEXT) for file in files)
    if len(kinds) > 1:
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise ValueError(
            f"'{path}' holds files of several kinds ({found}); choose one with a glob such as 'folder/*.jsonl'"
        )
    return next(iter(kinds))


def _from_text_files(path: str, files: list[str], split: str, *, streaming: bool) -> Any:
    if split != "train":
        raise ValueError(f"split {split!r} was asked for, but '{path}' is text files; name those of the split in path")
    features = datasets.Features({_TEXT: datasets.Value("string"), _GROUP: datasets.Value("string")})
    if streaming:
        return datasets.IterableDataset.from_generator(_texts, features=features, gen_kwargs={"files": files})
    return datasets.Dataset.from_list(list(_texts(files)), features=features)


def _texts(files: list[str]) -> Iterator[dict[str, str]]:
    for file in files:
        try:
            yield {_TEXT: Path(file).read_text(encoding="utf-8"), _GROUP: file}
        except ValueError as error:
            raise ValueError(
                f"{file} is not UTF-8 text ({error}); leave it out with a glob such as 'folder/**/*.py'"
            ) from error


def _from_row_files(path: str, files: list[str], kind: str, split: str, *, streaming: bool) -> Any:
    """Rows of local files, through the cache of ``datasets`` (in the user's home, not beside the files)."""
    folder = Path(path).expanduser()
    where = {"data_dir": str(folder)} if folder.is_dir() else {"data_files": files}  # a folder's train.jsonl is a split
    try:
        return datasets.load_dataset(kind, split=split, streaming=streaming, **where)
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # the last of them for an empty file
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(
            f"'{path}' cannot be read as {kind} with split {split!r} ({reason}); check the files and the split"
        ) from error


def _from_hub(path: str, name: str | None, split: str, *, streaming: bool) -> Any:
    missing = f"path '{path}' is no file, folder or glob that matches anything here"
    # Asking the hub for what cannot be there takes half a minute of retries without a network.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) or Path(path).suffix in {*_ROW_FILES, ".md", ".py", ".txt"}:
        raise ValueError(f"{missing}, and cannot be a dataset id of the Hugging Face hub; correct it, or make it first")
    try:
        return datasets.load_dataset(path, name, split=split, streaming=streaming)
    except (OSError, ValueError, DatasetsError) as error:
        raise NotHere(
            f"{missing}, and as a dataset id of the Hugging Face hub (name {name!r}, split {split!r}) it cannot be "
            f"loaded ({error}); correct it"
        ) from error


def _select(path: str, documents: Any, column: str) -> Any:
    """Only ``column``, as ``text``, and ``group`` if it is there."""
    if documents.features is not None:
        types = {name: getattr(feature, "dtype", "structure") for name, feature in documents.features.items()}
    else:  # of some streams only the first row tells
        first: dict[str, Any] = next(iter(documents), {})
        types = {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in first.items()}
    if column not in types:
        raise ValueError(f"no column {column!r} in '{path}'; set column to one of {', '.join(types)}")
    if types[column] not in ("string", "large_string", "null"):
        raise ValueError(
            f"column {column!r} of '{path}' holds {types[column]}, not text; set column to one that holds text"
        )
    documents = documents.select_columns([column, *({_GROUP} & {*types} - {column})])
    return documents if column == _TEXT else documents.rename_column(column, _TEXT)


def _not_blank(texts: list[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]
