"""Runs that are killed, stopped by signals, resumed by other processes or with another config, against uninterrupted ones."""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.evaluation import load_validations
from components.training import list_checkpoints, read_metrics, stop
from recipes import ebft
from tests.checkpoints import write_corpus
from tests.processes import QUICKSTART, finish, kill, launch, recipe
from tests.recipes.test_ebft import TIMED, material, numbers, overrides  # noqa: F401


@pytest.fixture(autouse=True)
def _leave_group():
    yield
    stop()


@pytest.fixture
def settings(overrides):  # noqa: F811
    """Six steps, each saved."""
    return [*overrides, "~validation", "max_steps=6", "save_every_n_steps=1"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the recipe as a command, in this process: its exit code and the one-line error, if there is one."""

    def main(settings):
        monkeypatch.setattr("sys.argv", ["recipes/ebft.py", "--config", str(QUICKSTART), *settings])
        code = ebft.main()
        stop()
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return code, "".join(errors)

    return main


def result(output_dir):
    """Weights of the newest checkpoint, and logged numbers."""
    return load_file(list_checkpoints(output_dir)[-1] / "model.safetensors"), numbers(read_metrics(output_dir))


def equal(one, other):
    return one[1] == other[1] and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


def wait_for_step(output_dir, step, processes):
    while not any(row["step"] >= step for row in read_metrics(output_dir)):
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ kills


def test_a_run_killed_again_and_again_ends_as_one_that_never_was(settings, tmp_path, run):
    """SIGKILL at random instants after steps 2, 3 and 4, most often while a checkpoint is written: bitwise equal."""
    assert run(settings) == (0, "")
    killed, chance = tmp_path / "killed", random.Random(1)
    for step in (2, 3, 4):
        processes = launch(1, recipe, [*settings, f"output_dir={killed}"])
        wait_for_step(killed, step, processes)
        time.sleep(chance.uniform(0, 0.3))
        kill(processes)
    assert finish(launch(1, recipe, [*settings, f"output_dir={killed}"])) == [0]
    assert equal(result(killed), result(tmp_path / "run"))


def test_two_processes_killed_go_on_as_if_they_were_not(settings, tmp_path):
    """SIGKILL to both; weights and numbers within rounding of the straight run."""
    assert finish(launch(2, recipe, settings)) == [0, 0]
    killed = tmp_path / "killed"
    processes = launch(2, recipe, [*settings, f"output_dir={killed}"])
    wait_for_step(killed, 3, processes)
    kill(processes)
    assert finish(launch(2, recipe, [*settings, f"output_dir={killed}"])) == [0, 0]
    resumed, straight = result(killed), result(tmp_path / "run")
    for name in straight[0]:
        torch.testing.assert_close(resumed[0][name], straight[0][name], atol=1e-6, rtol=0)
    for one, other in zip(resumed[1], straight[1], strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@pytest.mark.parametrize("momentum", [0.9, 0.0], ids=["momentum", "stateless"])
def test_one_process_two_and_one_again_are_one(momentum, settings, tmp_path):
    """Weights and momentum are resharded both ways. Rounding differs: a sum over two ranks has another order."""
    settings = [*settings, "loss.rl_coef=0", "loss.ce_coef=1", "~lr_scheduler", "~clip_grad_norm"]
    settings += ["optimizer=torch.optim.SGD", "~optimizer.betas", f"optimizer.momentum={momentum}", "optimizer.lr=0.1"]
    settings += ["resume_with_changes=[max_steps]"]
    assert finish(launch(1, recipe, [*settings, "batch_size=4"])) == [0]
    for world, steps in ((1, 2), (2, 4), (1, 6)):
        part = [*settings, f"output_dir={tmp_path / 'parts'}", f"batch_size={4 // world}", f"max_steps={steps}"]
        assert finish(launch(world, recipe, part)) == [0] * world
    parts, straight = result(tmp_path / "parts"), result(tmp_path / "run")
    for name in straight[0]:
        torch.testing.assert_close(parts[0][name], straight[0][name], atol=1e-5, rtol=1e-5)
    losses = [[row["cross_entropy"] for row in log] for _, log in (parts, straight)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    ("phase", "saved"),
    [
        (["generator=tests.signals.DuringRollouts", "generator.at=3"], 3),
        (["loss=tests.signals.DuringBackward", "loss.at=3"], 3),
        # The signal comes while the thread writes step 3: the fourth step may have begun, and is then finished.
        (["checkpointer=tests.signals.DuringSaving", "checkpointer.at=3"], None),
    ],
    ids=["rollouts", "backward", "saving"],
)
def test_sigterm_finishes_the_step_and_saves_it(phase, saved, settings, tmp_path, run, caplog):
    """Exit code 0, the command to go on is printed, and it leads to the end of an uninterrupted run."""
    settings = [*settings, "resume=never"]
    assert run([*settings, f"output_dir={tmp_path / 'straight'}"]) == (0, "")
    assert run([*settings, *phase]) == (0, "")
    done = int(list_checkpoints(tmp_path / "run")[-1].name.removeprefix("step_"))
    assert done == saved or (saved is None and done in (3, 4, 5))
    assert f"stopped after step {done}; go on with: tune run --nproc_per_node 1 recipes/ebft.py" in caplog.text
    assert re.search(r"go on with: .* resume=auto$", caplog.text, re.MULTILINE)
    assert not list((tmp_path / "run").glob(".step_*"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run([*settings, *phase, "resume=auto"]) == (0, "")
    assert equal(result(tmp_path / "run"), result(tmp_path / "straight"))


def test_sigterm_gives_up_a_validation(overrides, tmp_path, run, caplog):  # noqa: F811
    """No further step is taken, and resuming makes up for it. Before the first step there is nothing to save."""
    settings = [*overrides, "validation.batch_size=4", "validation.every_n_steps=2"]
    assert run([*settings, f"output_dir={tmp_path / 'straight'}"]) == (0, "")
    for call, step, kept in ((1, 0, []), (3, 2, [0])):  # two batches a validation
        folder = tmp_path / f"stopped_{step}"
        part = [*settings, f"output_dir={folder}", "validation.generator=tests.signals.DuringRollouts"]
        assert run([*part, f"validation.generator.at={call}"]) == (0, "")
        assert f"stopped after step {step}; go on with: tune run" in caplog.text
        assert [path.name for path in list_checkpoints(folder)] == [f"step_{step:06}"] * (step > 0)
        assert list(load_validations(folder)) == kept
        changed = ["validation.generator.at=0", "resume=auto", "resume_with_changes=[validation]"]
        assert run([*part, *changed]) == (0, "")
        assert equal(result(folder), result(tmp_path / "straight"))
        assert load_validations(folder) == load_validations(tmp_path / "straight")


def test_a_signal_to_one_rank_stops_all(settings, tmp_path):
    parts = ["generator=tests.signals.DuringRollouts", "generator.at=2", "generator.on_rank=1"]
    assert finish(launch(2, recipe, [*settings, *parts])) == [0, 0]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_000002"]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["alone", "as torchrun passes it on"])
def test_a_second_ctrl_c_stops_at_once(second, settings, tmp_path):
    parts = ["generator=tests.signals.DuringRollouts", "generator.at=2", f"generator.names=[SIGINT,{second.name}]"]
    assert finish(launch(1, recipe, [*settings, *parts])) == [-second]
    assert len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize(("command", "code"), [("tune", 1), ("ebft", 143)])
def test_sigterm_to_torchrun_reaches_the_run(settings, tmp_path, command, code):
    """The documented command: the agent passes the signal on and waits; it is not killed before it has saved."""
    command = [Path(sys.executable).parent / command, "run", "--nproc_per_node", "1", "recipes/ebft.py"]
    process = subprocess.Popen(
        [*command, "--config", "configs/quickstart.yaml", *settings, "max_steps=1000", "save_every_n_steps=1000"],
        cwd=QUICKSTART.parents[1],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not read_metrics(tmp_path / "run"):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, text = process.communicate(timeout=60)
    assert process.returncode == code
    assert ("SignalException" in text) == (code == 1)
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped after step {step}; go on with: tune run --nproc_per_node 1 " in text
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, step + 1))


# ------------------------------------------------------------------------------------------------ changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["optimizer.lr=1.0e-3"], "optimizer.lr: 0.003 -> 0.001"),
        (["optimizer.lr=1.0e-3", "resume_with_changes=[max_steps]"], "resume_with_changes=[max_steps,optimizer.lr]"),
        (["batch_size=4"], "the data stream to resume has global_batch_size 2, this run has 4; make them equal"),
        (["dataset.source.path={corpus}", "resume_with_changes=[dataset.source.path]"], "fingerprint"),
        (["feature_extractor.layers=[1]"], "feature_extractor.layers: [0.25, 0.5, 0.75] -> [1]"),
        (
            ["resume_with_changes=[optimiser.lr]"],
            "names 'optimiser.lr', which neither config has; did you mean 'optimizer.lr'?",
        ),
        (["resume_with_changes=optimizer.lr"], "list dotted keys, such as [optimizer.lr, max_steps]"),
        (
            ["optimizer=torch.optim.SGD", "~optimizer.betas", "resume_with_changes=[optimizer]"],
            "does not fit model and",
        ),
    ],
    ids=lambda value: value[-1].replace("/", "") if isinstance(value, list) else "",
)
def test_another_run_is_refused_with_the_difference(change, message, settings, tmp_path, run):
    """One sentence, and every file stays as it was."""
    (tmp_path / "other").mkdir()
    corpus = write_corpus(tmp_path / "other", documents=60)
    settings = [*settings, "max_steps=2"]
    assert run(settings) == (0, "")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, error = run([*settings, *(item.format(corpus=corpus) for item in change)])
    assert code == 1
    assert message in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_other_weights_of_the_feature_network_are_refused(settings, material, tmp_path, run):  # noqa: F811
    network = shutil.copytree(material[0], tmp_path / "network")
    settings = [*settings, "max_steps=2", f"feature_extractor.network.decoder.checkpoint_dir={network}"]
    assert run(settings) == (0, "")
    weights = load_file(network / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(weights, network / "model.safetensors")
    code, error = run([*settings, "max_steps=4", "resume_with_changes=[max_steps]"])
    assert code == 1
    assert re.search(
        r"feature_extractor reads frozen weights FrozenNetwork \w{16}, and .*step_000002 was trained with", error
    )


def test_stated_changes_take_effect_from_the_next_step(settings, tmp_path, run):
    """A learning rate and a longer schedule: what is logged after the change is what a run with them from the start logs."""
    schedule = ["lr_scheduler.decay=linear", "lr_scheduler.warmup=0"]
    assert run([*settings, *schedule, "max_steps=4"]) == (0, "")
    changed = ["resume_with_changes=[optimizer.lr,max_steps]", "optimizer.lr=1.0e-3", "max_steps=8"]
    assert run([*settings, *schedule, *changed]) == (0, "")
    rates = [row["lr"] for row in read_metrics(tmp_path / "run")]
    before = [3e-3 * left / 4 for left in (4, 3, 2, 1)]
    after = [1e-3 * left / 8 for left in (4, 3, 2, 1)]
    assert rates == pytest.approx(before + after)


def test_validation_left_out_by_a_signal_is_made_up_for(overrides, tmp_path, run):  # noqa: F811
    """A run that was stopped at the step of a validation ends with the same validations; the other keeps the best."""
    settings = [*overrides, "validation.every_n_steps=2", "save_every_n_steps=2"]
    settings += ["checkpointer.keep_best=cross_entropy", "checkpointer.best_is=highest"]
    assert run([*settings, f"output_dir={tmp_path / 'straight'}"]) == (0, "")
    phase = ["generator=tests.signals.DuringRollouts", "generator.at=2"]
    plain = "validation.generator._component_=components.rollouts.BlockParallelGenerator"
    assert run([*settings, *phase, plain]) == (0, "")
    assert not (tmp_path / "run" / "validation" / "step_000002.json").exists()
    assert run([*settings, plain, "resume_with_changes=[generator]"]) == (0, "")
    files = {path.name: path.read_bytes() for path in (tmp_path / "straight" / "validation").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "validation").iterdir()} == files
    values = {step: entry["cross_entropy"].mean() for step, entry in load_validations(tmp_path / "straight").items()}
    best = max((2, 4), key=values.__getitem__)
    assert {path.name for path in list_checkpoints(tmp_path / "straight")} == {f"step_00000{best}", "step_000004"}


def test_a_best_that_is_not_measured_is_refused_before_the_first_step(overrides, tmp_path, run):  # noqa: F811
    settings = [*overrides, "checkpointer.keep_best=crossentropy", "checkpointer.best_is=lowest"]
    code, error = run(settings)
    assert code == 1
    assert "keep_best is 'crossentropy', which validation does not measure; choose from alignment" in error
    code, error = run([*settings, "~validation", f"output_dir={tmp_path / 'other'}"])
    assert code == 1
    assert "keep_best needs validation" in error
