"""How a run of several processes ends when one of them hangs or fails: soon, with the cause said once and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.training import fail
from components.training.watchdog import Place, describe
from tests.checkpoints import write_checkpoint, write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("failures")
    write_checkpoint(directory / "checkpoint")
    write_corpus(directory)
    return directory


def ends(directory, *settings):
    """What two processes of the recipe write while they fail, and how many seconds they take for it."""
    overrides = [
        f"model.checkpoint_dir={directory / 'checkpoint'}",
        f"dataset.source.path={directory / 'corpus.jsonl'}",
        f"output_dir={directory / 'run'}",
        "dataset.seq_len=48",
        "resume=overwrite",
        "~metric_logger",
        "~validation",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["recipes/ebft.py", "--config", "configs/quickstart.yaml", *overrides, *settings]
    started = time.monotonic()
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "Connection closed" not in result.stderr  # what the others would say
    return result.stdout + result.stderr, time.monotonic() - started


def test_a_rank_that_hangs_ends_the_run_within_the_set_time_with_phase_and_ranks_named(material):
    """Nine seconds; the rest starts and ends the processes."""
    output, seconds = ends(material, "reward=tests.distributed.parts.Hangs", "timeout_minutes=0.15")
    (line,) = [line for line in output.splitlines() if "no progress" in line]
    assert line == (
        "error: no progress for 0.15 min: rank 0 waits after 'rewards' of step 2; rank 1 is still in 'rewards' of step 2 "
        "(set timeout_minutes higher if that takes so long)"
    )
    assert seconds < 100


def test_a_rank_that_breaks_ends_the_run_with_its_traceback_once(material):
    output, seconds = ends(material, "reward=tests.distributed.parts.Breaks")
    assert output.count("RuntimeError: a bug on one rank") == 1
    assert output.count("in happen") == 1
    assert output.count("train()\n") == 1  # nor any other traceback of the recipe
    assert seconds < 60


def test_a_rank_that_is_killed_is_named_and_nobody_elses_traceback_is_shown(material):
    output, seconds = ends(material, "reward=tests.distributed.parts.IsKilled")
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 1 does not answer and left no error of its own")
    assert "last heard of: " in line
    assert "train()" not in output
    assert seconds < 60


def test_a_mistake_that_all_ranks_find_is_said_once(material):
    output, _ = ends(material, "batch_size=1000")
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert line.startswith("error: the dataset has")
    assert 'recipes/ebft.py", line' not in output


def test_an_output_dir_that_the_nodes_do_not_share_is_refused(material):
    output, _ = ends(material, f"output_dir={material}/node_${{oc.env:RANK}}/run")
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "of rank 1 is not that of rank 0; name a folder that all nodes share" in line
    assert not list(material.glob("node_*/*")) + list(material.glob("node_*/.*"))


def test_a_mistake_found_before_there_is_a_group_is_said_by_one_process_of_a_node(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert fail("error: no such key") == 1
    assert capsys.readouterr().err == "error: no such key\n"


def test_who_waits_is_who_came_furthest():
    """Three ranks wait in the eighth place of their run, in two groups of one kind; rank 2 is still at its seventh."""
    waiting, behind = Place(8, "in 'update'", 12), Place(7, "in 'rollouts'", 12)
    assert describe([waiting, waiting, behind, waiting]) == (
        "ranks 0, 1, 3 wait in 'update' of step 12; rank 2 is still in 'rollouts' of step 12"
    )
    assert describe([behind, behind]) == "ranks 0, 1 are still in 'rollouts' of step 12"
    assert describe([waiting, None]) == ("rank 0 is still in 'update' of step 12; rank 1 never started")
