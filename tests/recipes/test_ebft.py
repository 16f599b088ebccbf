"""Whole runs of the recipe on a tiny model, with the quickstart's config: what is equal to what, and what is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.evaluation import load_validations
from components.models import load_decoder
from components.training import Interrupt, load_config, read_metrics, stop
from recipes.ebft import EBFTRecipe
from tests.checkpoints import write_checkpoint, write_corpus
from tests.tiny import whole

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    directory = tmp_path_factory.mktemp("material")
    write_checkpoint(directory / "checkpoint")
    return directory / "checkpoint", write_corpus(directory)


@pytest.fixture
def overrides(material, tmp_path):
    """The quickstart on the tiny model, four short steps."""
    checkpoint, corpus = material
    return [
        f"model.checkpoint_dir={checkpoint}",
        f"dataset.source.path={corpus}",
        f"validation.dataset.source.path={corpus}",
        f"output_dir={tmp_path / 'run'}",
        "dataset.seq_len=48",
        "validation.dataset.max_rows=8",
        "max_steps=4",
        "save_every_n_steps=2",
        "optimizer.lr=3.0e-3",
        "~metric_logger",
    ]


def build(overrides):
    recipe = EBFTRecipe(load_config(QUICKSTART, overrides))
    recipe.setup()
    return recipe


def train(overrides):
    """Run to the end; the recipe, its policy's weights, and what it logged."""
    recipe = build(overrides)
    try:
        recipe.train()
        weights = {name: whole(value) for name, value in recipe.policy.state_dict().items()}
        recipe.cleanup()
    finally:
        stop()
    return recipe, weights, read_metrics(recipe.output_dir)


TIMED = ("seconds", "tokens_per_second", "peak_memory")


def numbers(rows):
    """Logged rows without what differs between equal runs."""
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


@pytest.mark.parametrize("ce_coef", [0.0, 0.1])
def test_one_batch_of_eight_is_four_micro_batches_of_two(overrides, tmp_path, ce_coef):
    """Gradient accumulation changes nothing: same rollouts, and means over the whole step. One step of SGD with a rate of 1,
    so that the weights show every gradient at its size. (In later steps a rounding difference may tip a sampled token.)"""
    settings = [
        "max_steps=1",
        "lr_scheduler.warmup=0",
        f"loss.ce_coef={ce_coef}",
        "~clip_grad_norm",
        "save_every_n_steps=100",
    ]
    common = [*overrides, *settings, "optimizer=torch.optim.SGD", "~optimizer.betas", "optimizer.lr=1.0"]
    _, whole, whole_log = train([*common, "batch_size=8"])
    parts = [*common, "batch_size=2", "gradient_accumulation_steps=4", f"output_dir={tmp_path / 'parts'}"]
    _, split, split_log = train(parts)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], atol=1e-5, rtol=1e-5)
    for one, other in zip(numbers(split_log), numbers(whole_log), strict=True):
        # A mean of standard deviations is not the standard deviation of everything.
        one.pop("advantage_std"), other.pop("advantage_std")
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_activation_checkpointing_changes_nothing(overrides, tmp_path):
    _, plain, _ = train(overrides)
    _, recomputed, _ = train([*overrides, "activation_checkpointing=true", f"output_dir={tmp_path / 'recomputed'}"])
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], atol=1e-6, rtol=1e-5)


def test_compiled_layers_change_nothing_but_rounding(overrides, tmp_path):
    settings = [*overrides, "max_steps=1", "~validation"]
    _, _, plain = train(settings)
    _, _, compiled = train([*settings, "compile=true", f"output_dir={tmp_path / 'compiled'}"])
    for key in ("cross_entropy", "reward", "grad_norm"):
        assert compiled[0][key] == pytest.approx(plain[0][key], rel=1e-3)


def test_the_feature_network_is_bitwise_unchanged_and_the_policy_is_not(overrides):
    recipe = build(overrides)
    network = recipe.feature_extractor.network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    policy = {name: whole(value) for name, value in recipe.policy.state_dict().items()}
    recipe.train()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(not torch.equal(whole(v), policy[name]) for name, v in recipe.policy.state_dict().items())
    stop()


def test_a_resumed_run_is_the_uninterrupted_run(overrides, tmp_path):
    """Losses and weights, bitwise: two steps, a new process's worth of objects, two more."""
    _, straight, straight_log = train(overrides)
    halves = [*overrides, f"output_dir={tmp_path / 'halves'}"]
    recipe = build(halves)
    for _ in range(2):
        metrics = recipe.step([next(recipe.stream)])
        recipe.steps_done += 1
        recipe.metrics_log.append(recipe.steps_done, metrics)
    recipe.save()
    recipe.checkpointer.wait()
    stop()
    _, resumed, resumed_log = train(halves)
    assert numbers(resumed_log) == numbers(straight_log)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_a_resumed_stream_is_the_uninterrupted_stream(overrides, material, tmp_path):
    """Rows that are read while training goes on: the same, bitwise, after a stop between two windows of shuffled rows."""
    source = f"{{_component_: components.data.stream_text, path: {material[1]}}}"
    stream = f"dataset={{_component_: components.data.StreamedText, seq_len: 48, shuffle_rows: 3, source: {source}}}"
    settings = [*overrides[:1], *overrides[2:4], stream, *overrides[5:], "validation.dataset.seq_len=48"]
    settings = ["~dataset.source", *(s for s in settings if s != "dataset.seq_len=48")]
    _, straight, straight_log = train(settings)
    recipe = build(halves := [*settings, f"output_dir={tmp_path / 'halves'}"])
    for _ in range(2):
        recipe.metrics_log.append(recipe.steps_done + 1, recipe.step([next(recipe.stream)]))
        recipe.steps_done += 1
    recipe.save()
    recipe.checkpointer.wait()
    stop()
    _, resumed, resumed_log = train(halves)
    assert numbers(resumed_log) == numbers(straight_log)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_first_step_samples_and_scores_at_the_same_temperature(overrides):
    _, _, log = train([*overrides, "max_steps=1"])
    assert log[0]["logprob_gap"] < 1e-5


def test_everything_promised_is_logged(overrides):
    recipe, _, log = train(overrides)
    promised = {
        "alignment",
        "diversity",
        "reward",
        "advantage_std",
        "feature_matching_loss",
        "feature_matching_loss_whitened",
        "duplicate_rollouts",
        "negative_target_factors",
        "cross_entropy",
        "grad_norm",
        "logprob_gap",
        "tokens_per_second",
        "peak_memory_gib",
        "lr",
        "loss",
        "policy_loss",
        "seconds/rollouts",
        "seconds/features",
        "seconds/rewards",
        "seconds/update",
        "seconds/optimizer",
        "seconds/step",
    }
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    for row in log:
        assert promised <= row.keys()
    validations = load_validations(recipe.output_dir)
    assert list(validations) == [0, 4]
    assert {
        "cross_entropy",
        "feature_matching_loss",
        "feature_matching_loss_whitened",
        "alignment",
        "diversity",
    } <= validations[0].keys()
    assert (recipe.output_dir / "plots" / "training.png").stat().st_size > 10_000


def test_validation_cross_entropy_is_transformers_cross_entropy(overrides, material):
    """An independent model on the same rows (one document each, so that both see the same context)."""
    recipe = build([*overrides, "validation.dataset.isolate_documents=false"])
    with Interrupt(print) as interrupt:
        recipe.validate(interrupt)
    measured = load_validations(recipe.output_dir)[0]["cross_entropy"]
    model = AutoModelForCausalLM.from_pretrained(material[0], dtype=torch.float32)
    rows = torch.cat([batch.tokens for batch in recipe.validation_loader])
    with torch.no_grad():
        expected = model(rows, labels=rows).loss
    assert measured.mean() == pytest.approx(float(expected), abs=1e-4)
    stop()


def test_transformers_loads_the_checkpoint(overrides):
    recipe, weights, _ = train([*overrides, "max_steps=2"])
    path = recipe.output_dir / "step_000002"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert AutoTokenizer.from_pretrained(path).encode("def f1(x, y):") == recipe.tokenizer.encode("def f1(x, y):")
    tokens = torch.randint(0, 200, (1, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, load_decoder(path)(tokens), atol=1e-4, rtol=1e-4)
    saved = load_decoder(path).state_dict()
    assert all(torch.equal(value, saved[name.removeprefix("decoder.")]) for name, value in weights.items())


def test_checkpoints_beyond_keep_last_are_dropped(overrides):
    recipe, _, _ = train([*overrides, "save_every_n_steps=1", "keep_last=2"])
    assert sorted(path.name for path in recipe.output_dir.glob("step_*")) == ["step_000003", "step_000004"]
    assert not list(recipe.output_dir.glob(".step*"))


def test_bf16_trains_float32_weights(overrides):
    """At a small learning rate a bfloat16 weight would not move; the masters here do."""
    recipe, weights, log = train([*overrides, "dtype=bf16", "optimizer.lr=1e-6", "max_steps=1"])
    assert all(value.dtype == torch.float32 for value in weights.values())
    before = load_decoder(recipe.cfg.model.checkpoint_dir).state_dict()
    moved = [not torch.equal(value, before[name.removeprefix("decoder.")]) for name, value in weights.items()]
    assert all(moved)
    assert log[0]["logprob_gap"] < 0.1


def test_cross_entropy_alone_learns(overrides):
    """A sign that gradients go the right way: supervised steps lower the validation cross-entropy."""
    settings = ["loss.rl_coef=0", "loss.ce_coef=1", "max_steps=12", "save_every_n_steps=100", "optimizer.lr=1e-2"]
    recipe, _, _ = train([*overrides, *settings])
    validations = load_validations(recipe.output_dir)
    change = validations[12]["cross_entropy"].change_since(validations[0]["cross_entropy"])
    assert change.mean() < -5 * change.standard_error()


def test_the_reward_rises(overrides):
    """Policy gradients alone climb the reward they are given: alignment on a repeated batch rises by more than noise (by 7 to
    11 standard errors for the seeds tried)."""
    settings = ["max_steps=50", "save_every_n_steps=100", "dataset.max_rows=2", "optimizer.lr=1e-2", "~validation"]
    _, _, log = train([*overrides, *settings, "reward.diversity_coef=0", "reward.whitening=none", "loss.ce_coef=0"])
    rewards = [row["reward"] for row in log]
    first, last = torch.tensor(rewards[:10]), torch.tensor(rewards[-10:])
    noise = ((first.var() + last.var()) / 10) ** 0.5
    assert last.mean() - first.mean() > 3 * noise


@pytest.mark.parametrize(
    "settings",
    [
        ["generator.rollout_len=1"],
        ["generator.num_samples=2"],
        ["generator.num_samples=1", "advantage=components.advantages.Reinforce", "reward.whitening=none"],
        ["generator.top_p=0.9", "generator.top_k=20"],
        ["generator.stop_tokens=[5,6,7]", "feature_extractor.pooling=mean"],
        ["generator.anchors.document_mask=false"],
        ["generator.anchors.region=target"],
        ["feature_extractor.pooling=concat", "feature_extractor.norm=per_layer"],
        ["feature_extractor.combine=mean", "feature_extractor.layers=[1,2]"],
        ["feature_extractor.combine=stack", "reward.whitening=sample_space"],
        ["reward.diversity_coef=0.5", "advantage=components.advantages.GroupNorm"],
        ["feature_extractor.network.decoder.dtype=bf16", "dtype=bf16", "activation_checkpointing=true"],
        ["cpu_offload=true", "timeout_minutes=0.5"],
        ["dataset.isolate_documents=false", "gradient_accumulation_steps=2", "clip_grad_norm=0.1"],
    ],
    ids=lambda settings: settings[0],
)
def test_every_option_trains(overrides, settings):
    """A step with each option away from its default: finite numbers, and every weight moves."""
    recipe, weights, log = train([*overrides, "max_steps=1", *settings])
    assert all(value is not None for value in log[0].values())
    before = load_decoder(recipe.cfg.model.checkpoint_dir).state_dict()
    assert all(not torch.equal(value, before[name.removeprefix("decoder.")]) for name, value in weights.items())


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_learning_rate_follows_the_schedule(overrides, decay):
    _, _, log = train([*overrides, f"lr_scheduler.decay={decay}", "lr_scheduler.warmup=0.25"])
    rates = [row["lr"] / 3e-3 for row in log]
    expected = {"constant": [0.5, 1, 1, 1], "cosine": [0.5, 1, 0.75, 0.25], "linear": [0.5, 1, 2 / 3, 1 / 3]}
    assert rates == pytest.approx(expected[decay])


def test_epochs_say_how_long_a_run_is(overrides):
    """The corpus fills 4 rows; two epochs of 2 rows a step are 4 steps."""
    recipe, _, log = train([*overrides, "dataset.max_rows=4", "~max_steps", "epochs=2"])
    assert len(log) == recipe.max_steps == 4


def command(overrides):
    return [
        str(Path(sys.executable).parent / "tune"),
        *("run", "--nproc_per_node", "1", "recipes/ebft.py", "--config", "configs/quickstart.yaml"),
        *overrides,
    ]


def test_the_documented_command_runs_and_says_what_changed(overrides):
    """`tune run` as README has it, with all loggers of YAML, from the checkout."""
    overrides = [item for item in overrides if item != "~metric_logger"]
    result = subprocess.run(command(overrides), cwd=QUICKSTART.parents[1], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "cross-entropy" in result.stdout
    assert "paired" in result.stdout
    output_dir = Path(overrides[3].split("=")[1])
    assert list((output_dir / "tensorboard").rglob("events.*"))
    # A second time there is nothing left to do, and it says so by showing the same table.
    again = subprocess.run(command(overrides), cwd=QUICKSTART.parents[1], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    table = [line for line in result.stdout.splitlines() if "│" in line]
    assert table
    assert table == [line for line in again.stdout.splitlines() if "│" in line]


def test_several_metric_loggers_hear_the_same(overrides, tmp_path, capsys):
    loggers = "torchtune.training.metric_logging"
    nodes = (
        f"[{{_component_: {loggers}.StdoutLogger}},{{_component_: {loggers}.DiskLogger,log_dir: {tmp_path / 'disk'}}}]"
    )
    overrides = [item for item in overrides if item != "~metric_logger"]
    train([*overrides, "max_steps=1", "~metric_logger", f"metric_logger={nodes}"])
    written = "".join(path.read_text() for path in (tmp_path / "disk").iterdir())
    for text in (capsys.readouterr().out, written):
        assert "Step 1 | " in text
        assert "advantage_std:" in text
        assert "validation/cross_entropy:" in text


def test_saved_weights_say_their_dtype(overrides):
    recipe, _, _ = train([*overrides, "max_steps=1", "checkpointer.save_dtype=bf16"])
    path = recipe.output_dir / "step_000001"
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {value.dtype for value in load_file(path / "model.safetensors").values()} == {torch.bfloat16}
