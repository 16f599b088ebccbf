"""Mistakes of users: each ends in one sentence that names place and remedy, before training, with nothing overwritten."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from components.training import stop
from recipes import ebft
from tests.checkpoints import write_checkpoint, write_corpus
from tests.recipes.test_ebft import QUICKSTART, build, material, overrides, train  # noqa: F401
from tests.tiny import whole


@pytest.fixture(autouse=True)
def _leave_group():
    yield
    stop()


def refused(settings, capsys, monkeypatch):
    """Run the recipe as a command; its exit code must say that it failed. The one line it prints."""
    monkeypatch.setattr("sys.argv", ["ebft.py", "--config", str(QUICKSTART), *settings])
    assert ebft.main() == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tokenizer.checkpoint_dir=nowhere", "no tokenizer.json in checkpoint_dir 'nowhere'"),
        ("dataset.source.path=nowhere.txt", "nowhere.txt"),
        ("dataset.seq_len=15", "rows of 15 tokens have no room for a block: context_len 8 + rollout_len 8 = 16"),
        ("generator.num_samples=1", "RLOO needs at least 2 samples per anchor, generator.num_samples is 1"),
        ("generator.temperature=0", "generator.temperature is 0"),
        ("generator.temperature=-1", "temperature is -1"),
        ("generator.anchors.strde=4", "did you mean 'stride'?"),
        ("generator.anchors.stride=0", "stride is 0"),
        ("generator.anchors.region=answers", "generator.anchors.region"),
        ("feature_extractor.layers=[0.5,9]", "layers names 9"),
        ("feature_extractor.pooling=max", "feature_extractor.pooling"),
        ("reward._component_=components.rewards.FeatureMatchingRewards", "did you mean 'FeatureMatchingReward'?"),
        ("reward.whitening=pca", "reward.whitening"),
        ("loss.ce_coef=-1", "ce_coef -1"),
        ("optimizer.lrr=1", "did you mean 'lr'?"),
        ("optimiser.lr=1", "did you mean 'optimizer'?"),
        ("batch_size=0", "batch_size is 0; give a whole number of at least 1"),
        ("batch_size=16.0", "batch_size is 16.0"),
        ("batch_size=1000", "fewer than one batch of 1000"),
        ("dtype=fp16", "dtype is 'fp16'; choose one of fp32, bf16"),
        ("device=tpu", "device is 'tpu'"),
        ("cpu_offload=1", "cpu_offload is 1; give true or false"),
        ("data_parallel_replicate=2", "data_parallel_replicate is 2, which does not divide the 1 processes"),
        ("timeout_minutes=0", "timeout_minutes is 0; give a number above 0"),
        ("compile=yes please", "compile is 'yes please'"),
        ("clip_grad_norm=0", "clip_grad_norm is 0"),
        ("resume=maybe", "resume is 'maybe'"),
        ("epochs=1", "either max_steps or epochs"),
        ("~seed", "seed: this key is missing"),
        ("seed=9223372036854775808", "give a whole number from 0 to 2**63 - 1"),
        ("seed=${nothing}", "seed: Interpolation key 'nothing' not found"),
        ("reward=null", "reward is null; write a mapping with a _component_, or remove the key"),
        ("validation.reward=5", "validation.reward is 5; write a mapping with a _component_"),
        ("metric_logger=5", "metric_logger: is 5; write a mapping with a _component_"),
        (
            "metric_logger={_component_: torchtune.training.metric_logging.DiskLogger}",
            "DiskLogger needs the argument 'log_dir'",
        ),
        ("generator.stop_tokens=[-1]", "generator.stop_tokens names the id -1, and the model's are from 0 to"),
        ("generator.stop_tokens=[99999]", "generator.stop_tokens names the id 99999"),
        ("advantage=components.rewards.FeatureMatchingReward", "no Advantage (it cannot be called with (rewards))"),
        (
            "feature_extractor.network={_component_: torch.nn.Identity}",
            "no FeatureNetwork (it lacks keep_layers, num_layers)",
        ),
        ("validation.every=3", "validation.every"),
        ("validation.dataset.seq_len=9", "validation.generator: rows of 9 tokens have no room for a block"),
        (
            "validation.reward={_component_: components.rewards.VerifierReward, verifier: "
            "{_component_: components.rewards.ExactMatch}}",
            "validation.generator has StridedAnchors as anchors, and reward judges whole completions",
        ),
    ],
)
def test_one_sentence_and_nothing_written(setting, message, overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    text = refused([*overrides, setting], capsys, monkeypatch)
    assert message in text
    assert len(text) < 600
    assert not (tmp_path / "run").exists()


def test_a_cuda_device_that_is_not_there(overrides, capsys, monkeypatch):  # noqa: F811
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert "torch sees no CUDA device" in refused([*overrides, "device=cuda"], capsys, monkeypatch)


def test_a_missing_checkpoint(overrides, material, tmp_path, capsys, monkeypatch):  # noqa: F811
    settings = [*overrides, f"tokenizer.checkpoint_dir={material[0]}", "model.checkpoint_dir=nowhere"]
    assert "model: no config.json in checkpoint_dir 'nowhere'" in refused(settings, capsys, monkeypatch)
    assert not (tmp_path / "run").exists()


def test_an_unsupported_model(overrides, material, tmp_path, capsys, monkeypatch):  # noqa: F811
    changed = shutil.copytree(material[0], tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    text = refused([*overrides, f"model.checkpoint_dir={changed}"], capsys, monkeypatch)
    assert "model_type 'gpt2' in config.json is not supported; choose one of llama, mistral, qwen2" in text


def test_damaged_weights(overrides, material, tmp_path, capsys, monkeypatch):  # noqa: F811
    changed = shutil.copytree(material[0], tmp_path / "changed")
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    text = refused([*overrides, f"model.checkpoint_dir={changed}"], capsys, monkeypatch)
    assert "model.safetensors cannot be read" in text


def test_weights_of_another_model(overrides, material, tmp_path, capsys, monkeypatch):  # noqa: F811
    changed = shutil.copytree(material[0], tmp_path / "changed")
    save_file({"model.embed_tokens.weight": torch.zeros(3, 3)}, changed / "model.safetensors")
    text = refused([*overrides, f"model.checkpoint_dir={changed}"], capsys, monkeypatch)
    assert "do not fit its config.json" in text


def test_a_tokenizer_that_does_not_fit(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    small = write_checkpoint(tmp_path / "small", vocab_size=100)
    settings = [f"model.checkpoint_dir={small}", f"feature_extractor.network.decoder.checkpoint_dir={small}"]
    text = refused([*overrides, *settings], capsys, monkeypatch)
    assert "tokens, the model 100: tokenizer and model must come from the same checkpoint" in text


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": "  "}\n'])
def test_an_empty_corpus(content, overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    assert str(path) in refused([*overrides, f"dataset.source.path={path}"], capsys, monkeypatch)


def test_documents_shorter_than_a_block(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    path = tmp_path / "short.jsonl"
    path.write_text('{"text": "def f1(x, y):"}\n' * 100)
    text = refused([*overrides, f"dataset.source.path={path}"], capsys, monkeypatch)
    assert "every document (or target) is shorter than the prefix and rollout together" in text


def test_an_output_directory_in_use(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Refused, unless told to go on or to overwrite; and a directory that is no run is never overwritten."""
    train([*overrides, "max_steps=2"])
    checkpoint = (tmp_path / "run" / "step_000002" / "model.safetensors").read_bytes()
    stop()
    assert "is not empty; go on with resume=auto" in refused([*overrides, "resume=never"], capsys, monkeypatch)
    stop()
    text = refused([*overrides, "optimizer.lr=1.0e-3"], capsys, monkeypatch)
    assert "optimizer.lr: 0.003 -> 0.001" in text
    assert (tmp_path / "run" / "step_000002" / "model.safetensors").read_bytes() == checkpoint

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    for resume in ("auto", "overwrite"):
        stop()
        settings = [*overrides, f"output_dir={tmp_path / 'home'}", f"resume={resume}"]
        assert "holds something that is not a run" in refused(settings, capsys, monkeypatch)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


def test_a_resumed_run_takes_as_many_rows_a_step(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Fewer per process are right for more processes; here they are not, and the run's own config stays."""
    train([*overrides, "max_steps=2"])
    stop()
    config = (tmp_path / "run" / "config.yaml").read_text()
    text = refused([*overrides, "max_steps=2", "batch_size=1"], capsys, monkeypatch)
    assert "global_batch_size 2, this run has 1; make them equal" in text
    assert (tmp_path / "run" / "config.yaml").read_text() == config


def test_overwriting_starts_again(overrides, tmp_path):  # noqa: F811
    _, _, first = train([*overrides, "max_steps=2"])
    stop()
    _, _, second = train([*overrides, "max_steps=1", "resume=overwrite"])
    assert [row["step"] for row in first] == [1, 2]
    assert [row["step"] for row in second] == [1]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == ["step_000001"]


def test_a_run_that_is_to_be_overwritten_stays_if_the_new_one_cannot_start(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    train([*overrides, "max_steps=1"])
    stop()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for logger, message in (
        ("torch.nn.Identity", "metric_logger: Identity is no MetricLogger"),
        ("torchtune.training.metric_logging.DiskLogger, log_dir: /dev/null/no", "metric_logger: "),
    ):
        settings = [*overrides, "resume=overwrite", f"metric_logger={{_component_: {logger}}}"]
        assert message in refused(settings, capsys, monkeypatch)
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files
        assert not list(tmp_path.glob(".run*"))


def test_two_samples_are_explained(overrides, caplog, tmp_path):  # noqa: F811
    build([*overrides, "generator.num_samples=2"])
    assert "diversity reward has no baseline (0)" in caplog.text


def test_blocks_across_documents_are_mentioned(overrides, caplog):  # noqa: F811
    build([*overrides, "generator.anchors.document_mask=false"])
    assert "continue one document and are compared with another; leave them out" in caplog.text


def test_weights_that_are_not_numbers_stop_the_run_and_keep_the_checkpoint(overrides, tmp_path):  # noqa: F811
    """Step 3 blows up: the error names it, and the checkpoint of step 2 is what it was."""
    recipe = build([*overrides, "max_steps=6"])
    step = recipe.step

    def step_after_a_disaster(batches):
        if recipe.steps_done == 2:
            recipe.checkpointer.wait()
            checkpoints.append((tmp_path / "run" / "step_000002" / "model.safetensors").read_bytes())
            with torch.no_grad():
                next(recipe.policy.parameters()).fill_(torch.nan)
        return step(batches)

    checkpoints: list[bytes] = []
    recipe.step = step_after_a_disaster
    with pytest.raises(
        FloatingPointError,
        match=r"step 3, rank 0: the policy's logits are not finite.*newest checkpoint: .*step_000002",
    ):
        recipe.train()
    assert [path.name for path in (tmp_path / "run").glob("step_*")] == ["step_000002"]
    assert (tmp_path / "run" / "step_000002" / "model.safetensors").read_bytes() == checkpoints[0]


def test_weights_that_are_not_numbers_are_not_saved(overrides, tmp_path):  # noqa: F811
    recipe = build(overrides)
    recipe.save()
    recipe.checkpointer.wait()
    recipe.steps_done = 1
    with torch.no_grad():
        next(recipe.policy.parameters()).fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="is not finite after step 1, so that nothing was saved"):
        recipe.save()
    assert [path.name for path in (tmp_path / "run").glob("*step_*")] == ["step_000000"]


def test_a_gradient_that_is_not_finite_changes_no_weight(overrides):  # noqa: F811
    recipe = build(overrides)
    before = [whole(parameter) for parameter in recipe.policy.parameters()]
    advantage = recipe.advantage
    recipe.advantage = lambda rewards: advantage(rewards) * torch.inf
    with pytest.raises(FloatingPointError, match="step 1, rank 0: the gradient is not finite"):
        recipe.train()
    after = [whole(parameter) for parameter in recipe.policy.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_an_unknown_corpus_column_is_answered_with_those_there_are(overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    path = write_corpus(tmp_path)
    settings = [*overrides, f"dataset.source.path={path}", "dataset.source.column=content"]
    text = refused(settings, capsys, monkeypatch)
    assert "content" in text
    assert "text" in text
