"""The checkpointer on a tiny policy: what is written and read back, what damage is found, what is kept, kills, failures."""

import json
import math
import random
import resource
import shutil
import time
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

from components.models import Policy, load_decoder
from components.training import (
    CheckpointError,
    HFCheckpointer,
    Manifest,
    find_checkpoint,
    list_checkpoints,
    shard,
    start,
    stop,
)
from components.training.manifest import expendable, find_damage, read_manifest, step_name, write_manifest
from tests.checkpoints import write_checkpoint
from tests.processes import kill, launch
from tests.tiny import whole


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=1)


@pytest.fixture
def _group():
    start("cpu")
    yield
    stop()


def build(base, output_dir, **options):
    """A policy that has taken a step, its optimizer, and a checkpointer."""
    policy = Policy(load_decoder(base))
    shard(policy, torch.device("cpu"), dtype="fp32", activation_checkpointing=False, compile=False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
    take_step(policy, optimizer)
    return policy, optimizer, HFCheckpointer(checkpoint_dir=str(base), output_dir=str(output_dir), **options)


def take_step(policy, optimizer):
    """A gradient that depends on the weights, so that each state of both has only one successor."""
    for parameter in policy.parameters():
        parameter.grad = parameter.detach() + 0.1
    optimizer.step()
    optimizer.zero_grad()


def manifest(step, **options):
    return Manifest(step=step, config={"output_dir": "run"}, world_size=1, **options)


def weights(policy):
    return {name: whole(value) for name, value in policy.state_dict().items()}


def look(output_dir):
    """What a recipe does with ``resume: auto``."""
    (output_dir / "config.yaml").touch()
    return find_checkpoint(OmegaConf.create({"output_dir": str(output_dir), "resume": "auto"}))


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_what_is_restored_is_what_was_saved_whatever_the_dtype_of_the_model(base, tmp_path, save_dtype):
    """Bitwise, optimizer included: one more step from either gives the same weights."""
    policy, optimizer, checkpointer = build(base, tmp_path, save_dtype=save_dtype)
    moving = {"average": torch.arange(3.0)}
    checkpointer.save(manifest(1), policy, optimizer, {"position": 7}, moving)
    take_step(policy, optimizer)  # while it is written
    checkpointer.wait()

    other, other_optimizer, checkpointer = build(base, tmp_path)
    take_step(other, other_optimizer)
    read = {"average": torch.zeros(3)}
    found = look(tmp_path)
    assert checkpointer.load(found.path, other, other_optimizer, read) == {"position": 7}
    assert torch.equal(read["average"], torch.arange(3.0))
    take_step(other, other_optimizer)
    expected = weights(policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(other).items())


@pytest.mark.usefixtures("_group")
def test_a_save_in_the_background_writes_the_files_of_one_in_the_foreground(base, tmp_path):
    """Training changes every weight meanwhile. Only DCP's metadata has an id of its own for each save."""
    written = {}
    for asynchronous in (True, False):
        policy, optimizer, checkpointer = build(base, tmp_path / str(asynchronous), asynchronous=asynchronous)
        checkpointer.save(manifest(1), policy, optimizer, {})
        take_step(policy, optimizer)
        checkpointer.wait()
        (path,) = list_checkpoints(tmp_path / str(asynchronous))
        written[asynchronous] = read_manifest(path).files
        assert written[asynchronous].pop("state/.metadata")
    assert written[True] == written[False]


@pytest.mark.usefixtures("_group")
def test_what_is_not_trained_is_not_saved_and_yet_in_the_model(base, tmp_path):
    policy, optimizer, checkpointer = build(base, tmp_path)
    policy.decoder.layers.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    take_step(policy, optimizer)
    with torch.no_grad():
        for mine, first in zip(policy.decoder.layers.parameters(), load_decoder(base).layers.parameters(), strict=True):
            mine.copy_(first)
    checkpointer.save(manifest(1), policy, optimizer, {})
    checkpointer.wait()
    assert b"decoder.layers" not in (tmp_path / "step_000001" / "state" / ".metadata").read_bytes()
    saved = load_decoder(tmp_path / "step_000001").state_dict()
    assert all(torch.equal(value, saved[name.removeprefix("decoder.")]) for name, value in weights(policy).items())
    checkpointer.load(tmp_path / "step_000001", policy, optimizer)


@pytest.mark.usefixtures("_group")
def test_another_optimizer_is_refused(base, tmp_path):
    policy, optimizer, checkpointer = build(base, tmp_path, asynchronous=False)
    checkpointer.save(manifest(1), policy, optimizer, {})
    momentum = torch.optim.SGD(policy.parameters(), lr=0.01, momentum=0.9)
    with pytest.raises(ValueError, match=r"step_000001/state does not fit model and optimizer"):
        checkpointer.load(tmp_path / "step_000001", policy, momentum)


# ------------------------------------------------------------------------------------------------ damage


@pytest.fixture(scope="module")
def two_checkpoints(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    start("cpu")
    policy, optimizer, checkpointer = build(base, directory, keep_last=2, asynchronous=False)
    for step in (1, 2):
        take_step(policy, optimizer)
        checkpointer.save(manifest(step), policy, optimizer, {"position": step})
    stop()
    return directory


FILES = (
    "state/__0_0.distcp",
    "state/.metadata",
    "model.safetensors",
    "training_state.pt",
    "config.json",
    "checkpoint.json",
)


@pytest.mark.usefixtures("_group")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_in_any_file_is_found(two_checkpoints, data):
    path = two_checkpoints / "step_000002" / data.draw(st.sampled_from(FILES))
    good = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    if path.name == "checkpoint.json" and _same_json(bad, good):
        return
    refused_and_untouched(two_checkpoints, path, bytes(bad))


def _same_json(bad, good):
    """A flip between the values, such as a blank that becomes a newline, changes nothing."""
    try:
        return json.loads(bad) == json.loads(good)
    except ValueError:
        return False


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_is_found(two_checkpoints, name):
    path = two_checkpoints / "step_000002" / name
    refused_and_untouched(two_checkpoints, path, path.read_bytes()[:-2])


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("name", [name for name in FILES if name != "config.json"])
def test_a_file_of_another_checkpoint_is_found(two_checkpoints, name):
    refused_and_untouched(
        two_checkpoints, two_checkpoints / "step_000002" / name, (two_checkpoints / "step_000001" / name).read_bytes()
    )


def refused_and_untouched(run, path, content):
    """With ``content`` in place of a file, resuming names it in one sentence, and leaves everything as it is."""
    good = path.read_bytes()
    path.write_bytes(content)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    try:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            look(run)
        assert str(path) in str(error.value)
        assert "move" in str(error.value)
        assert "\n" not in str(error.value)
        after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "config.yaml"}
        before.pop(run / "config.yaml", None)
        assert after == before
    finally:
        path.write_bytes(good)


@pytest.mark.usefixtures("_group")
def test_a_missing_file_and_a_missing_manifest_are_found(two_checkpoints, tmp_path):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    (run / "step_000002" / "training_state.pt").unlink()
    with pytest.raises(ValueError, match=r"training_state.pt is not what was saved \(it is missing\)"):
        look(run)
    (run / "step_000002" / "checkpoint.json").unlink()
    with pytest.raises(ValueError, match=r"step_000002 has no checkpoint.json"):
        look(run)
    shutil.rmtree(run / "step_000002")
    assert look(run).manifest.step == 1


@pytest.mark.usefixtures("_group")
def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "step_000001").mkdir()
    with monkeypatch.context() as other_version:
        other_version.setattr("components.training.manifest.asdict", lambda saved: asdict(saved) | {"quality": 1})
        write_manifest(tmp_path / "step_000001", manifest(1))
    with pytest.raises(
        ValueError, match=r"step_000001 was saved by another version .*\(differing in quality\); go on with"
    ):
        look(tmp_path)


# ------------------------------------------------------------------------------------------------ retention


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(0, 3).map(float)), min_size=1, max_size=7),
    st.integers(1, 3),
    st.sampled_from(["lowest", "highest"]),
)
def test_the_newest_and_the_best_are_kept(tmp_path_factory, values, keep_last, best_is):
    run = tmp_path_factory.mktemp("retention")
    for step, value in enumerate(
        values
    ):  # None: not validated at this step, though a number is at hand from the one before
        at = step - 1 if value is None else step
        (run / step_name(step)).mkdir()
        metric = {"cross_entropy": -1.0 if value is None else value}
        write_manifest(run / step_name(step), manifest(step, validated_at=at, metrics=metric))
    paths = list_checkpoints(run)
    dropped = expendable(paths, keep_last=keep_last, keep_best="cross_entropy", best_is=best_is)
    kept = [step for step, path in enumerate(paths) if path not in dropped]
    measured = [value for value in values if value is not None and not math.isnan(value)]
    expected = set(range(len(values))[-keep_last:])
    if measured:
        expected.add(values.index(min(measured) if best_is == "lowest" else max(measured)))
    assert set(kept) == expected
    assert expendable(paths, keep_last=keep_last, keep_best=None, best_is=None) == paths[:-keep_last]


@pytest.mark.usefixtures("_group")
def test_the_best_checkpoint_stays_on_the_disk(base, tmp_path):
    policy, optimizer, checkpointer = build(base, tmp_path, keep_best="cross_entropy", best_is="lowest")
    for step, value in enumerate([3.0, 1.0, 2.0, 2.5]):
        metrics = {"cross_entropy": value}
        checkpointer.save(manifest(step, validated_at=step, metrics=metrics), policy, optimizer, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000003"]


@pytest.mark.usefixtures("_group")
def test_a_checkpoint_with_a_damaged_manifest_is_not_dropped_and_stops_no_save(base, tmp_path):
    policy, optimizer, checkpointer = build(base, tmp_path, keep_best="cross_entropy", best_is="lowest")
    for step, value in enumerate([3.0, 1.0]):
        checkpointer.save(manifest(step, validated_at=step, metrics={"cross_entropy": value}), policy, optimizer, {})
    checkpointer.wait()
    damaged = tmp_path / "step_000001" / "checkpoint.json"
    damaged.write_text(damaged.read_text().replace("cross_entropy", "cross_entr0py"))
    for step in (2, 3):
        checkpointer.save(manifest(step, validated_at=step, metrics={"cross_entropy": 2.0}), policy, optimizer, {})
    checkpointer.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002", "step_000003"]


@pytest.mark.usefixtures("_group")
def test_which_is_best_must_be_said_and_measured(base, tmp_path):
    with pytest.raises(ValueError, match="give both"):
        HFCheckpointer(checkpoint_dir=str(base), output_dir=str(tmp_path), keep_best="cross_entropy")
    checkpointer = HFCheckpointer(
        checkpoint_dir=str(base), output_dir=str(tmp_path), keep_best="crossentropy", best_is="lowest"
    )
    with pytest.raises(CheckpointError, match="does not measure; choose from alignment, cross_entropy"):
        checkpointer.check_metrics({"cross_entropy": 1.0, "alignment": 1.0})


# ------------------------------------------------------------------------------------------------ failures and kills


@pytest.mark.usefixtures("_group")
def test_a_failure_in_the_background_is_raised_by_the_next_poll_and_drops_nothing(base, tmp_path):
    """The system refuses to write more than 100 kB to a file, as a full disk would."""
    policy, optimizer, checkpointer = build(base, tmp_path)
    checkpointer.save(manifest(1), policy, optimizer, {})
    checkpointer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        checkpointer.save(manifest(2), policy, optimizer, {})
        with pytest.raises(CheckpointError) as error:
            poll_to_the_end(checkpointer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint of step 2 could not be written" in str(error.value)
    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert look(tmp_path).manifest.step == 1
    checkpointer.save(manifest(2), policy, optimizer, {})  # the cause removed, it works again
    checkpointer.wait()
    assert look(tmp_path).manifest.step == 2


def poll_to_the_end(checkpointer):
    for _ in range(3000):
        time.sleep(0.01)
        checkpointer.poll()


def count_up(base, run, ready):
    """Go on from the newest checkpoint, saving every step in the background, until killed. Weights are the step's number."""
    start("cpu")
    policy, optimizer, checkpointer = build(base, run, keep_last=2)
    step = 0
    if (found := look(run)) is not None:
        checkpointer.load(found.path, policy, optimizer)
        step = found.manifest.step
        assert all((value == step).all() for value in weights(policy).values())
    ready.touch()
    while True:
        step += 1
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(step)
        checkpointer.save(manifest(step), policy, optimizer, {"step": step})
        checkpointer.poll()


def test_no_kill_loses_a_complete_checkpoint_or_leaves_one_that_does_not_load(base, tmp_path):
    """SIGKILL at 30 random instants of a process that does nothing but save, most of them inside a save."""
    run, ready, chance = tmp_path / "run", tmp_path / "ready", random.Random(0)
    run.mkdir()
    newest, partial = 0, 0
    for _ in range(30):
        ready.unlink(missing_ok=True)
        processes = launch(1, count_up, base, run, ready)
        while not ready.exists():
            assert processes[0].is_alive(), processes[0].exitcode
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        assert processes[0].is_alive()
        kill(processes)
        partial += bool(list(run.glob(".step_*")))
        checkpoints = list_checkpoints(run)
        for path in checkpoints:
            found = read_manifest(path)
            assert find_damage(path, sorted(found.files), found) is None
            saved = load_file(path / "model.safetensors")
            assert all((value == found.step).all() for value in saved.values())
        steps = [read_manifest(path).step for path in checkpoints]
        assert len(steps) <= 3  # keep_last, and one whose predecessor was not yet dropped
        assert max(steps, default=0) >= newest
        newest = max(steps, default=0)
    assert newest >= 3
    assert partial >= 10  # or the kills came too late to test anything
