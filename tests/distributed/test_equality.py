"""A step does not depend on how many ranks share it: one process against two and four (gloo, CPU), and two nodes."""

import functools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from components.blocks import StridedAnchors
from components.data import TrainStream, batch_loader
from components.training import start, stop
from tests.checkpoints import write_checkpoint, write_corpus
from tests.distributed import worker
from tests.distributed.parts import UnevenRows

ROOT = Path(__file__).parents[2]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
FOUR = ["ebft", "replicated", "uneven", "lora", "offloaded", "sharded_in_copies"]
TWO = [*worker.MEASURED, *worker.CASES]


def launch(directory, out, names, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(Path(worker.__file__)), directory, out, *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Every case in one process; the directory they are in, and what they gave."""
    directory = tmp_path_factory.mktemp("equality")
    write_checkpoint(directory / "checkpoint")
    # Matrices that 4 bits can hold.
    write_checkpoint(directory / "wide", hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    write_corpus(directory)
    start("cpu")
    results = {name: worker.train(directory, "alone", name) for name, case in worker.CASES.items() if case.like is None}
    stop()
    shutil.rmtree(directory / "alone" / "ebft" / "step_000005")  # "resumed" goes on from step 3
    return directory, results


@pytest.fixture(scope="module")
def spread(alone):
    """What a case gives on a number of ranks; each number of them is started once, for all its cases."""
    directory, _ = alone

    @functools.cache
    def run(processes):
        names = {2: TWO, 4: FOUR}[processes]
        finish(launch(directory, str(processes), names, "--standalone", f"--nproc_per_node={processes}"))

    def result(processes, name):
        run(processes)
        return torch.load(directory / str(processes) / f"{name}.pt")

    return result


@pytest.mark.parametrize(("processes", "name"), [(2, name) for name in worker.CASES] + [(4, name) for name in FOUR])
def test_ranks_together_do_what_one_process_does(alone, spread, processes, name):
    """Rollouts, losses, gradients and weights of every step. What resumes has only the later steps to compare."""
    expected, got = alone[1][worker.CASES[name].like or name], spread(processes, name)
    steps = len(got["gradients"])
    assert steps == (2 if name == "resumed" else worker.STEPS)
    assert torch.equal(got["tokens"], expected["tokens"][-steps:])
    compared = {"loss", "policy_loss", "cross_entropy", "reward", "feature_matching_loss", "kl", "grad_norm"}
    compared &= expected["log"][0].keys()
    assert {"loss", "grad_norm"} <= compared <= got["log"][0].keys()
    for key in compared:
        columns = (torch.tensor([row[key] for row in result["log"]]) for result in (got, expected))
        torch.testing.assert_close(*columns, **CLOSE)
    for one, other in zip(got["gradients"], expected["gradients"][-steps:], strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(got["weights"], expected["weights"], **CLOSE)


@pytest.mark.parametrize("processes", [2, 4])
def test_validation_is_the_same_row_by_row(alone, spread, processes):
    expected, got = alone[1]["ebft"]["validations"], spread(processes, "ebft")["validations"]
    assert list(got) == list(expected) == [0, worker.STEPS]
    for step in got:
        for name, measured in expected[step].items():
            assert got[step][name]["weights"] == measured["weights"], name
            torch.testing.assert_close(
                torch.tensor(got[step][name]["values"]), torch.tensor(measured["values"]), atol=1e-4, rtol=1e-4
            )


def test_a_rollout_gathers_every_weight_once_however_long_it_is(spread):
    for measured in spread(2, "all_gathers").values():
        assert measured["calls"] == measured["groups"] > 1
        assert not measured["whole"]


def test_gradients_are_reduced_once_a_step_or_once_a_micro_batch(spread):
    once, each = spread(2, "reductions")[False], spread(2, "reductions")[True]
    assert once["calls"] == once["groups"] > 1
    assert each["calls"] == 2 * each["groups"]


def test_the_uneven_case_leaves_ranks_with_no_block_that_counts(alone):
    """So that the comparison above means something: of the micro-batches of four ranks, some have blocks and some have none."""
    start("cpu")
    recipe = worker.RecordedRecipe(
        worker.training.load_config(ROOT / "configs" / "quickstart.yaml", worker.overrides(alone[0], "alone", "uneven"))
    )
    stop()
    dataset = UnevenRows(tokenizer=worker.training.instantiate(recipe.cfg.tokenizer, path="tokenizer"), seq_len=48)
    anchors = StridedAnchors(stride=12, context_len=8, document_mask=True)
    for step in range(worker.STEPS):
        counted = []
        for rank in range(4):
            options = {"seed": recipe.cfg.seed, "shuffle": True, "rank": rank, "world_size": 4}
            stream = TrainStream(batch_loader(dataset, batch_size=1, **options))
            batch = [next(stream) for _ in range(step + 1)][-1]
            counted.append(bool(anchors(batch, 8).mask.any()))
        if any(counted) and not all(counted):
            return
    pytest.fail("every step has blocks on all ranks, or on none")


def test_two_nodes_are_two_processes_of_one(alone, spread):
    """Two launchers that find each other on the loopback device, one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=nodes", "--local_addr=127.0.0.1"]
    options.append(f"--rdzv_endpoint=127.0.0.1:{port}")
    for node in [launch(alone[0], "nodes", ["ebft"], *options) for _ in range(2)]:
        finish(node)
    expected, got = spread(2, "ebft"), torch.load(alone[0] / "nodes" / "ebft.pt")
    assert [row["loss"] for row in got["log"]] == [row["loss"] for row in expected["log"]]
    torch.testing.assert_close(got["weights"], expected["weights"], atol=0, rtol=0)
