"""The command ``ebft``: recipes and configs by name, from a folder that is not the checkout."""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from components.cli import RECIPES, build_parser, config_names, known_configs
from components.training import load_config
from tests.recipes.test_ebft import QUICKSTART, material, overrides  # noqa: F401


def ebft(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "components.cli", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(QUICKSTART.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("launch", [(), ("--nproc_per_node", "2")])
def test_a_run_by_names_from_another_folder(launch, overrides, tmp_path):  # noqa: F811
    settings = [*overrides, "max_steps=1", "batch_size=1", "~validation"]
    done = ebft("run", *launch, "ebft", "--config", "quickstart", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((tmp_path / "run" / "step_000001" / "checkpoint.json").read_text())
    assert manifest["world_size"] == (2 if launch else 1)


def test_a_wrong_key_is_one_sentence_and_an_exit_code(overrides, tmp_path):  # noqa: F811
    done = ebft("run", "ebft", "--config", "quickstart", *overrides, "optimizer.lrr=1", cwd=tmp_path)
    assert done.returncode == 1
    assert "did you mean 'lr'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_listed_can_be_copied_and_is_what_is_shipped(tmp_path):
    listed = ebft("ls", cwd=tmp_path).stdout
    assert "smollm2_135m/lora" in listed
    copied = ebft("cp", "quickstart", "mine.yaml", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "mine.yaml").read_text() == QUICKSTART.read_text()
    ebft("cp", "ebft", "mine.py", cwd=tmp_path)
    assert (tmp_path / "mine.py").read_text() == (QUICKSTART.parents[1] / "recipes" / "ebft.py").read_text()


def test_a_config_with_bases_is_copied_whole(tmp_path):
    name = "qwen2_5_1_5b/coding_ebft"
    copied = ebft("cp", name, "mine.yaml", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    assert load_config(tmp_path / "mine.yaml") == load_config(known_configs()[name])
    shown = ebft("cat", name, cwd=tmp_path).stdout
    assert load_config(tmp_path / "mine.yaml") == OmegaConf.create(shown)


def test_every_file_is_a_config_of_one_recipe_or_a_part_of_configs_without_output():
    configs = [path for recipe in RECIPES for path in config_names(recipe).values()]
    assert len(configs) == len(set(configs))
    assert all("output_dir" in load_config(path) for path in configs)
    parts = set(QUICKSTART.parent.rglob("*.yaml")) - set(configs)
    assert {"common", "coding", "ebft", "qwen2_5_1_5b"} <= {path.stem for path in parts}
    assert all(OmegaConf.load(path).get("output_dir", "???") == "???" for path in parts)


@pytest.mark.parametrize("name", ["tasks/coding", "configs/tasks/coding.yaml", "nothing"])
def test_what_is_no_config_is_refused_in_one_sentence(name):
    done = ebft("validate", name, cwd=QUICKSTART.parents[1])
    assert done.returncode == 1
    named = "output_dir: this key is missing" if name.endswith(".yaml") else f"there is no config or file '{name}'"
    assert done.stderr.splitlines()[-1].startswith(f"error: {named}")
    assert "Traceback" not in done.stderr
    done = ebft("run", "ebft", "--config", name, cwd=QUICKSTART.parents[1])
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_help_speaks_of_ebft_and_not_of_tune():
    (commands,) = (action.choices for action in build_parser()._actions if action.choices)
    for name, command in commands.items():
        assert f"usage: ebft {name}" in command.format_usage()
