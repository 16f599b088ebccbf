"""Two processes (gloo, CPU) against one: the same rows in a step give the same gradients, whoever computes them."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from components.training import read_metrics
from tests.checkpoints import write_checkpoint, write_corpus

ROOT = Path(__file__).parents[2]


def run(processes, settings):
    command = [str(Path(sys.executable).parent / "tune"), "run", "--nproc_per_node", str(processes), "recipes/ebft.py"]
    result = subprocess.run(
        [*command, "--config", "configs/quickstart.yaml", *settings],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_processes_take_the_step_that_one_takes(tmp_path):
    """Supervised part only: its gradient does not hang on random numbers. Documents of unequal length leave the processes
    unequal numbers of tokens to learn from, so means of means would differ from the mean over all."""
    checkpoint, corpus = write_checkpoint(tmp_path / "checkpoint"), write_corpus(tmp_path)
    common = [
        f"model.checkpoint_dir={checkpoint}",
        f"dataset.source.path={corpus}",
        "dataset.seq_len=48",
        "max_steps=3",
        "loss.rl_coef=0",
        "loss.ce_coef=1",
        "optimizer=torch.optim.SGD",
        "~optimizer.betas",
        "optimizer.lr=0.1",
        "~metric_logger",
        "~validation",
    ]
    run(1, [*common, f"output_dir={tmp_path / 'one'}", "batch_size=4"])
    run(2, [*common, f"output_dir={tmp_path / 'two'}", "batch_size=2"])
    one, two = (load_file(tmp_path / name / "step_000003" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-5)
    for key in ("loss", "cross_entropy", "grad_norm"):
        losses = [[row[key] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
        torch.testing.assert_close(*(torch.tensor(values) for values in losses), atol=1e-5, rtol=1e-5)
