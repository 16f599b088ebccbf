"""Where text comes from: files here, or a dataset of the Hugging Face hub. Nothing is tokenised here."""

import glob
import re
from collections import Counter
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError
from torchtune.utils import get_logger, log_rank_zero

_ROW_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TEXT = "text"


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
        A dataset with the one column ``text``, in the order of file names and rows.

    Raises:
        ValueError: nothing there, files that cannot be read together or at all, a missing column or split, or no
            document that is not blank.
    """
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"max_documents is {max_documents}; keep at least 1, or leave it out for all")
    files = _files(path)
    if not files:
        documents = _from_hub(path, name, split)
    elif name is not None:
        raise ValueError(f"name {name!r} is a configuration of a hub dataset, but '{path}' is here; leave name out")
    elif (kind := _kind(path, files)) == _TEXT:
        documents = _from_text_files(path, files, split)
    else:
        documents = _from_row_files(path, files, kind, split)
    documents = _select(path, documents, column)
    if max_documents is not None:
        documents = documents.select(range(min(max_documents, len(documents))))
    kept = documents.filter(_not_blank, input_columns=_TEXT, batched=True)
    blank = len(documents) - len(kept)
    if not kept:
        raise ValueError(f"no text in '{path}' (blank documents: {blank}); give another path, column or split")
    log_rank_zero(get_logger("INFO"), f"{path}: {len(kept)} documents, {blank} blank ones dropped")
    return kept


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


def _from_text_files(path: str, files: list[str], split: str) -> datasets.Dataset:
    if split != "train":
        raise ValueError(f"split {split!r} was asked for, but '{path}' is text files; name those of the split in path")
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{file} is not UTF-8 text ({error}); leave it out with a glob such as 'folder/**/*.py'"
            ) from error
    return datasets.Dataset.from_dict({_TEXT: texts}, features=datasets.Features({_TEXT: datasets.Value("string")}))


def _from_row_files(path: str, files: list[str], kind: str, split: str) -> datasets.Dataset:
    """Rows of local files, through the cache of ``datasets`` (in the user's home, not beside the files)."""
    folder = Path(path).expanduser()
    try:
        if folder.is_dir():
            return datasets.load_dataset(kind, data_dir=str(folder), split=split)  # knows train.jsonl by its name
        return datasets.load_dataset(kind, data_files=files, split=split)
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # the last of them for an empty file
        reason = str(error.__cause__ or error) or "it is empty"
        raise ValueError(
            f"'{path}' cannot be read as {kind} with split {split!r} ({reason}); check the files and the split"
        ) from error


def _from_hub(path: str, name: str | None, split: str) -> datasets.Dataset:
    missing = f"path '{path}' is no file, folder or glob that matches anything here"
    # Asking the hub for what cannot be there takes half a minute of retries without a network.
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) or Path(path).suffix in {*_ROW_FILES, ".md", ".py", ".txt"}:
        raise ValueError(f"{missing}, and cannot be a dataset id of the Hugging Face hub; correct it")
    try:
        return datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"{missing}, and as a dataset id of the Hugging Face hub (name {name!r}, split {split!r}) it cannot be "
            f"loaded ({error}); correct it"
        ) from error


def _select(path: str, documents: datasets.Dataset, column: str) -> datasets.Dataset:
    """Only ``column``, as ``text``."""
    if column not in documents.column_names:
        raise ValueError(f"no column {column!r} in '{path}'; set column to one of {', '.join(documents.column_names)}")
    dtype = getattr(documents.features[column], "dtype", "structure")
    if dtype not in ("string", "large_string", "null"):
        raise ValueError(f"column {column!r} of '{path}' holds {dtype}, not text; set column to one that holds text")
    documents = documents.select_columns(column)
    return documents if column == _TEXT else documents.rename_column(column, _TEXT)


def _not_blank(texts: list[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]
