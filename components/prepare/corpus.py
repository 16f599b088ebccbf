"""How a corpus is split and written, whatever its rows are: by group, the same bytes every time, all of it or nothing.

A corpus is a folder of ``.jsonl`` files, one per part, with a ``MANIFEST.json`` that says where the rows come from, what
was left out, under which licence they are, and what each file holds.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# The parts of all corpora: one may replace another that has fewer or more of them.
CORPUS_FILES = (
    "MANIFEST.json",
    "README.md",
    "out_of_domain.jsonl",
    "test.jsonl",
    "train.jsonl",
    "validation.jsonl",
)
_TEXTS = ("text", "prompt", "completion")


def write_corpus(
    output_dir: Path, parts: Mapping[str, Sequence[Row]], *, about: Mapping[str, Any], readme: str | None = None
) -> None:
    """Write ``<part>.jsonl`` for each part, ``MANIFEST.json`` and ``README.md``: the same bytes for the same arguments.

    Args:
        output_dir: an earlier corpus there is replaced.
        parts: rows by the name of their part: train, validation, test or out_of_domain.
        about: what else the manifest says: sources, versions, licences, what was left out.
        readme: text of ``README.md``; None writes no such file.

    Raises:
        ValueError: ``output_dir`` holds other things, or a part is empty.
    """
    for name, rows in parts.items():
        if not rows:
            total = sum(map(len, parts.values()))
            raise ValueError(f"{name}.jsonl would be empty ({total} rows in all); take more of them or other fractions")
    files = {}
    with replacing(output_dir, CORPUS_FILES) as staging:
        for name, rows in parts.items():
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            (staging / f"{name}.jsonl").write_bytes(content)
            files[f"{name}.jsonl"] = {
                "rows": len(rows),
                "characters": sum(len(row[column]) for row in rows for column in _TEXTS if column in row),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        (staging / "MANIFEST.json").write_text(json.dumps({**about, "files": files}, indent=2) + "\n")
        if readme is not None:
            (staging / "README.md").write_text(readme)


def split_rows(
    rows: Iterable[Row], *, key: str, seed: int, validation_fraction: float, test_fraction: float = 0.0
) -> dict[str, list[Row]]:
    """Rows of ``train``, ``validation`` and, if its fraction is not 0, ``test``, in their order.

    Rows that agree in ``key`` stay together. Their part depends on that value and on ``seed`` alone: it does not change
    when other rows come or go, and a larger fraction only moves rows out of ``train``.

    Raises:
        ValueError: a fraction is negative, or nothing would be left to train on.
    """
    if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction > 1:
        raise ValueError(
            f"--validation-fraction is {validation_fraction} and --test-fraction {test_fraction}; "
            "give numbers from 0 to 1 whose sum is less than 1"
        )
    parts: dict[str, list[Row]] = {"train": [], "validation": []}
    if test_fraction:
        parts["test"] = []
    for row in rows:
        position = hash_unit(seed, "split", row[key])
        if position < validation_fraction:
            parts["validation"].append(row)
        elif position >= 1 - test_fraction:
            parts["test"].append(row)
        else:
            parts["train"].append(row)
    return parts


def shuffled(rows: Iterable[Row], *, seed: int) -> list[Row]:
    """Rows in an order that depends on their ``id`` and on ``seed`` alone."""
    return sorted(rows, key=lambda row: hash_unit(seed, "order", row["id"]))


def hash_unit(*parts: object) -> float:
    """A number in [0, 1), the same for the same parts on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


@contextmanager
def replacing(output_dir: Path, names: Collection[str]) -> Iterator[Path]:
    """A directory beside ``output_dir`` to write files of the given names to; takes its place if nothing is raised.

    Raises:
        ValueError: ``output_dir`` is a file, or holds something of another name.
    """
    target = output_dir.resolve()
    if target.exists():
        others = sorted({path.name for path in target.iterdir()} - set(names)) if target.is_dir() else [target.name]
        if others:
            raise ValueError(f"{output_dir} holds {others[0]}, which is not ours to replace; name another --output-dir")
    staging = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        assert {path.name for path in staging.iterdir()} <= set(names)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say in one line what is being done, and then how long it took."""
    print(f"{name} ... ", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed")
        raise
    print(f"{time.perf_counter() - start:.1f} s")


def find_package(name: str, *, install: str) -> Path:
    """The folder of an installed package, without importing it.

    Args:
        name: as it is imported.
        install: what ``pip install`` needs to hear.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec(name)
    if spec is None:
        raise ValueError(f"the package {name} is not installed; run: pip install {install}")
    assert spec.origin is not None
    return Path(spec.origin).parent


def installed(distribution: str, *, license: str) -> dict[str, str]:
    """How a manifest names an installed distribution as a source."""
    return {"name": distribution, "version": version(distribution), "license": license, "from": "PyPI"}


def readme_of(corpus: str, sources: Sequence[Mapping[str, str]]) -> str:
    """The text of ``README.md`` beside a corpus: where it comes from, under which licences, and what made it."""
    rows = "".join(
        f"| {source['name']} {source['version']} | {source['from']} | {source['license']} |\n" for source in sources
    )
    return (
        f"# {corpus}\n\nMade by `python -m components.prepare {corpus}` from the sources below, whose licences hold for "
        f"what was taken from them.\nMANIFEST.json counts what was taken and what was left out.\n\n"
        f"| source | from | licence |\n|---|---|---|\n{rows}"
    )
