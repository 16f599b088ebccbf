"""Every command of README and docs: it runs here, word for word, or the page says why not.

A page's commands run in their order, in a folder that looks like a checkout in which ``make quickstart`` was called, except
that model and corpora are tiny, and so are ``max_steps`` and ``max_rows`` of configs. A block whose commands cannot run has a
comment on the line above, with one of the reasons below.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from components import cli
from components.training import stop
from recipes import ebft, evaluate
from tests.checkpoints import LINES, write_checkpoint, write_corpus
from tests.docs.pages import PAGES, ROOT, blocks, commands

REASONS = ("needs a hub", "needs a GPU", "needs several machines", "installs", "takes ")
# What pages speak of besides the quickstart's output: copies of it, and what other pages' commands leave.
OTHER_RUNS = {"docs/pages.md": ["plain", "mixed"]}
BEFORE = {"docs/pages.md": commands(blocks("docs/evaluation.md", "bash")[0])}
# Runs of one process that get one of their own, as a reader starts them; the others run in this one, which is faster.
SUBPROCESSES = {"docs/tutorial.md": 1}
MARKED = [block for page in PAGES for block in blocks(page, "bash") if block.marker]
RUN = {page: [block for block in blocks(page, "bash") if not block.marker] for page in PAGES}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A checkout after ``make quickstart``."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("components", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("configs", "docs/examples"):
        shutil.copytree(ROOT / name, folder / name)
    for config in folder.glob("**/*.yaml"):
        text = re.sub(r"\bmax_steps: \d+", "max_steps: 3", config.read_text())
        config.write_text(re.sub(r"\bmax_rows: \d+", "max_rows: 8", text))
    write_checkpoint(folder / "checkpoints" / "SmolLM2-135M-Instruct", eos="<|im_end|>")
    (folder / "data" / "stdlib").mkdir(parents=True)
    write_corpus(folder, documents=400).rename(folder / "data" / "stdlib" / "train.jsonl")
    write_corpus(folder).rename(folder / "data" / "stdlib" / "validation.jsonl")
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "functions.py").write_text("".join(LINES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["tune", "run", "--nproc_per_node", "1", "recipes/ebft.py", "--config", "configs/quickstart.yaml"], patch)
    return folder


@pytest.fixture
def checkout(prepared, tmp_path):
    """A copy of it."""
    return shutil.copytree(prepared, tmp_path / "checkout", symlinks=True)


def run(words, monkeypatch):
    """A command in this process."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    try:
        match words:
            case [
                "tune",
                "run",
                "--nproc_per_node",
                "1",
                "recipes/ebft.py" | "recipes/evaluate.py" as recipe,
                *arguments,
            ]:
                monkeypatch.setattr(sys, "argv", [recipe, *arguments])
                assert {"recipes/ebft.py": ebft, "recipes/evaluate.py": evaluate}[recipe].main() == 0
            case ["ebft", *arguments]:
                monkeypatch.setattr(sys, "argv", ["ebft", *arguments])
                cli.main()
            case ["python", script]:
                runpy.run_path(script, run_name="__main__")
            case _:
                run_apart(words)
    finally:
        stop()


def run_apart(words):
    """A command in a process of its own, with the programs of this environment."""
    programs = {"ebft": [sys.executable, "-m", "components.cli"], "tune": [str(Path(sys.executable).parent / "tune")]}
    done = subprocess.run(
        [*programs.get(words[0], words[:1]), *words[1:]],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]])
def test_the_commands_of_a_page_run_as_they_stand(page, checkout, monkeypatch, capsys):
    for name in OTHER_RUNS.get(page, []):
        shutil.copytree(checkout / "outputs" / "quickstart", checkout / "outputs" / name)
    monkeypatch.chdir(checkout)
    for words in BEFORE.get(page, []):
        run(words, monkeypatch)
    apart = SUBPROCESSES.get(page, 0)
    for words in [words for block in RUN[page] for words in commands(block)]:
        several = "--nproc_per_node" in words and words[words.index("--nproc_per_node") + 1] != "1"
        if several or (apart and words[:2] == ["tune", "run"]):
            apart -= not several
            run_apart(words)
        else:
            run(words, monkeypatch)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: f"{block.page}:{block.line}")
def test_what_is_not_run_says_why(block):
    kind, _, reason = block.marker.partition(": ")
    assert kind == "not run"
    assert reason.startswith(REASONS)


def test_there_are_commands():
    assert len([words for page in PAGES for block in RUN[page] for words in commands(block)]) > 25
