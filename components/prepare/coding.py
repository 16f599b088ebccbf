"""Q&A coding with tests that can be run: functions of five packages, and CodeI/O; nothing that is in HumanEval, and nothing to
train on that is in a held-out part.

What every record promises was seen to hold: in three isolated runs the reference answer gave what each of its tests expects.
"""

import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.prepare.codeio import read_codeio
from components.prepare.corpus import Row, find_package, installed, phase, readme_of, shuffled, split_rows, write_corpus
from components.prepare.doctests import read_doctests
from components.prepare.humaneval import read_humaneval
from components.prepare.problems import make_records

if TYPE_CHECKING:
    from components.rewards import Sandbox

_LICENSES = {
    "algorithms": "MIT",
    "boltons": "BSD-3-Clause",
    "more_itertools": "MIT",
    "pydash": "MIT",
    "toolz": "BSD-3-Clause",
    "reasoning_gym": "Apache-2.0",
}
_NGRAM = 20


def prepare_coding(
    output_dir: Path, *, validation_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0
) -> None:
    """Make a corpus of functions to write, each with an instruction, a reference answer and tests.

    Args:
        output_dir: an earlier corpus there is replaced.
        validation_fraction: share of the modules and of CodeI/O's problems held out.
        test_fraction: share held out for the end.
        seed: decides which are held out.

    Raises:
        ValueError: a package or bubblewrap is missing, ``output_dir`` holds other things, or a part would be empty.
    """
    from components.rewards import Sandbox  # here: neither --help nor another corpus should wait for torch

    roots = {name: find_package(name, install=f"--no-deps {name}") for name in _LICENSES}
    sources = [installed(name, license=license) for name, license in _LICENSES.items()]
    held_out = list(read_humaneval())
    # Less processor time than verifiers give by default: a reference answer passes there with time to spare.
    sandbox = Sandbox(cpu_seconds=2, wall_seconds=60.0, output_kb=1024)
    dropped: dict[str, Counter[str]] = {name: Counter() for name in roots}
    rows: list[Row] = []
    for name, root in roots.items():
        with phase(f"running the functions of {name}"):
            if name == "reasoning_gym":
                problems = read_codeio(root / "data" / "codeio.jsonl.gz", sandbox=sandbox, dropped=dropped[name])
            else:
                problems = list(read_doctests(name, root, dropped=dropped[name]))
            records = make_records(problems, sandbox=sandbox, dropped=dropped[name])
            records = decontaminate(records, held_out, dropped=dropped[name])
            rows += verify(records, sandbox=sandbox, dropped=dropped[name])
    parts = split_rows(
        shuffled(rows, seed=seed),
        key="group",
        seed=seed,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
    )
    parts = keep_apart(parts, dropped=dropped)
    kept = Counter(row["origin"] for part in parts.values() for row in part)
    about = {
        "corpus": "coding",
        "python": platform.python_version(),
        "sources": sources,
        "records": {name: kept[name] for name in roots},
        "dropped": {name: dict(sorted(counts.items())) for name, counts in dropped.items()},
        "split": {
            "by": "group",
            "seed": seed,
            "validation_fraction": validation_fraction,
            "test_fraction": test_fraction,
        },
    }
    with phase(f"writing {kept.total()} records"):
        write_corpus(output_dir, parts, about=about, readme=readme_of("coding", sources))
    print(f"made {output_dir}")


def verify(records: Sequence[Row], *, sandbox: "Sandbox", dropped: Counter[str]) -> list[Row]:
    """Records whose reference answer passes all its tests, run once more and judged as completions are.

    Args:
        records: with ``completion`` and ``tests``.
        sandbox: runs the reference answers.
        dropped: counts what is left out.
    """
    from components.rewards import UnitTests

    scores = UnitTests(sandbox=sandbox)([record["completion"] for record in records], list(records))
    kept = [record for record, score in zip(records, scores, strict=True) if score == 1]
    dropped["reference answer fails its tests in a third run"] += len(records) - len(kept)
    return kept


def decontaminate(records: Iterable[Row], held_out: Iterable[Row], *, dropped: Counter[str]) -> list[Row]:
    """Records that share neither a function's name nor 20 words in a row with a problem kept for evaluation.

    Args:
        records: in whose answers any function counts, helpers too.
        held_out: records with ``entry_point``.
        dropped: counts what is left out, by reason.
    """
    held_out = list(held_out)
    names = {row["entry_point"].lower() for row in held_out}
    grams = _ngrams(held_out)
    kept = []
    for record in records:
        if names.intersection(re.findall(r"def (\w+)", record["completion"].lower())):
            dropped["function of the same name in HumanEval"] += 1
        elif not grams.isdisjoint(_ngrams([record])):
            dropped[f"{_NGRAM} words in a row also in HumanEval"] += 1
        else:
            kept.append(record)
    return kept


def keep_apart(parts: Mapping[str, list[Row]], *, dropped: Mapping[str, Counter[str]]) -> dict[str, list[Row]]:
    """The parts of a corpus, without what of ``train`` has 20 words in a row in common with a record of another part.

    Modules and problems stay together in the split, but now and then two of them solve the same task in the same words.

    Args:
        parts: rows by the name of their part.
        dropped: counts what is left out of each origin, by reason.
    """
    grams = _ngrams(row for name, rows in parts.items() if name != "train" for row in rows)
    train = []
    for record in parts["train"]:
        if grams.isdisjoint(_ngrams([record])):
            train.append(record)
        else:
            dropped[record["origin"]][f"{_NGRAM} words in a row also in validation or test"] += 1
    return {**parts, "train": train}


def _ngrams(records: Iterable[Row]) -> set[tuple[str, ...]]:
    """All runs of 20 words in prompts with their answers. Comments of answers do not count: one that CodeI/O writes into every
    sixth program would make them all alike."""
    grams: set[tuple[str, ...]] = set()
    for record in records:
        text = record["prompt"] + re.sub(r"#.*", "", record["completion"])
        words = re.findall(r"\w+", text.lower())
        grams.update(tuple(words[start : start + _NGRAM]) for start in range(len(words) - _NGRAM + 1))
    return grams
