"""A corpus of raw code: the standard library of the running interpreter, one row per file."""

import ast
import platform
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from components.prepare.corpus import Row, hash_unit, phase, split_rows, write_corpus

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


def prepare_stdlib(
    output_dir: Path, *, validation_fraction: float = 0.1, seed: int = 0, max_files: int | None = None
) -> None:
    """Make a corpus of the running interpreter's standard library, one row per file.

    Args:
        output_dir: an earlier corpus there is replaced.
        validation_fraction: share of the files held out.
        seed: decides which files are held out, their order, and with it which ``max_files`` are taken.
        max_files: take only as many, held-out ones included.

    Raises:
        ValueError: ``output_dir`` holds other things, a part would be empty, or ``max_files`` is not positive.
    """
    if max_files is not None and max_files < 1:
        raise ValueError(f"--max-files is {max_files}; take at least 1, or leave it out for all")
    root = Path(sysconfig.get_paths()["stdlib"])
    with phase(f"reading {root}"):
        rows = list(islice(read_python_files(root, seed=seed), max_files))
    about = {
        "source": "the standard library of CPython",
        "python": platform.python_version(),
        "license": "PSF-2.0: Python Software Foundation License Agreement, https://docs.python.org/3/license.html",
        "max_files": max_files,
        "validation_fraction": validation_fraction,
        "seed": seed,
    }
    with phase(f"writing {len(rows)} files"):
        parts = split_rows(rows, key="path", seed=seed, validation_fraction=validation_fraction)
        write_corpus(output_dir, parts, about=about)
    print(f"made {output_dir}")


def read_python_files(root: Path, *, seed: int) -> Iterator[Row]:
    """Rows ``{"text", "path", "license"}`` of a standard library's files, in an order that ``seed`` shuffles.

    Left out are installed packages, tests, ``encodings`` (one template filled in a hundred times), files that are mostly
    data, not UTF-8 or shorter than 1,000 characters, and all but the first of several with the same text. ``path`` is
    relative to ``root``, with forward slashes.
    """
    paths = (file.relative_to(root) for file in root.rglob("*.py"))
    names = [path.as_posix() for path in paths if not _SKIPPED_FOLDERS.intersection(path.parts)]
    seen = set()
    for name in sorted(names, key=lambda name: hash_unit(seed, "order", name)):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) >= 1000 and text not in seen and not is_mostly_data(text):
            seen.add(text)
            yield {"text": text, "path": name, "license": "PSF-2.0"}


def is_mostly_data(source: str) -> bool:
    """Whether assignments and calls outside any definition take more than half of the lines of a module's statements.

    So do generated tables; a docstring counts as a statement, but not as data.
    """

    def lines(nodes: Iterable[ast.stmt]) -> int:
        return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in nodes)

    module = ast.parse(source)
    code = module.body if ast.get_docstring(module) is None else module.body[1:]
    data = [node for node in code if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr)]
    return lines(data) > lines(module.body) / 2
