"""What a stopped run says of going on."""

import pytest
from omegaconf import OmegaConf

from components.training import resume_command

COMMAND = ["recipes/ebft.py", "--config", "my.yaml", "loss.ce_coef=0.1"]


@pytest.mark.parametrize(
    ("here", "world", "resume", "expected"),
    [
        (
            "1",
            "1",
            "never",
            "tune run --nproc_per_node 1 recipes/ebft.py --config my.yaml loss.ce_coef=0.1 resume=auto",
        ),
        ("4", "4", "auto", "tune run --nproc_per_node 4 recipes/ebft.py --config my.yaml loss.ce_coef=0.1"),
        (
            "4",
            "8",
            "auto",
            "tune run --nnodes 2 --nproc_per_node 4 recipes/ebft.py --config my.yaml loss.ce_coef=0.1 (on every node, with the "
            "--rdzv options it was started with)",
        ),
    ],
    ids=["one process", "four of one node", "four of each of two nodes"],
)
def test_the_command_that_goes_on_is_that_of_the_start(monkeypatch, here, world, resume, expected):
    monkeypatch.setattr("sys.argv", COMMAND)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert resume_command(OmegaConf.create({"resume": resume})) == expected
