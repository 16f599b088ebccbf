"""Whole evaluations of tiny checkpoints: what is written and refused, and that stopping or sharing work changes nothing."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from components import __version__
from components.evaluation import CrossEntropy, check_evaluation, load_summary, load_validations
from components.training import load_config, stop
from recipes import evaluate
from recipes.ebft import EBFTRecipe
from recipes.evaluate import EvaluationRecipe
from tests.checkpoints import write_checkpoint, write_corpus
from tests.processes import QUICKSTART, finish, launch

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2_135m" / "evaluate.yaml"


@pytest.fixture(autouse=True)
def _leave_group():
    yield
    stop()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two checkpoints that share a tokenizer, and prompts with their completions."""
    directory = tmp_path_factory.mktemp("evaluation")
    write_checkpoint(directory / "base")
    write_checkpoint(directory / "tuned", num_hidden_layers=3)
    return directory, write_corpus(directory)


def completing(name, component, *options, samples, temperature):
    """The override that adds a measure of completions; about one token in thirty stops them."""
    generator = [
        "_component_: components.rollouts.BlockParallelGenerator",
        "anchors: {_component_: components.rollouts.CompletionAnchor}",
        "rollout_len: 6",
        f"num_samples: {samples}",
        f"temperature: {temperature}",
        "stop_tokens: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]",
    ]
    node = [
        f"_component_: {component}",
        "batch_size: 2",
        "dataset: {_component_: tests.recipes.parts.Prompts}",
        f"generator: {{{', '.join(generator)}}}",
        *options,
    ]
    return f"measures.{name}={{{', '.join(node)}}}"


@pytest.fixture
def overrides(material, tmp_path):
    directory, corpus = material
    return [
        f"checkpoints={{base: {directory / 'base'}, tuned: {directory / 'tuned'}}}",
        f"checkpoints.ebft={directory / 'tuned'}",
        f"measures.cross_entropy.dataset.source.path={corpus}",
        "measures.cross_entropy.dataset.seq_len=40",
        "measures.cross_entropy.dataset.max_rows=10",
        "measures.calibration.lengths=[1,2,4]",
        "measures.calibration.generator.rollout_len=4",
        "measures.calibration.batch_size=3",
        "measures.token_entropy.batch_size=2",
        completing("completions", "components.evaluation.Completions", "ks: [1, 2]", samples=3, temperature=1.0),
        "measures.completions.verifier={_component_: tests.recipes.parts.Digits}",
        completing("translation", "components.evaluation.Translation", samples=1, temperature=0),
        "resamples=50",
        f"output_dir={tmp_path / 'evaluation'}",
    ]


def run(overrides):
    recipe = EvaluationRecipe(load_config(CONFIG, overrides))
    try:
        recipe.setup()
        recipe.evaluate()
        recipe.save()
    finally:
        recipe.cleanup()
    return recipe.output_dir


def command(settings):
    """One rank, as the command line runs it."""
    sys.argv = ["recipes/evaluate.py", "--config", str(CONFIG), *settings]
    sys.exit(evaluate.main())


def results(output_dir):
    """``results.json`` without the config, which names directories."""
    summary = load_summary(output_dir)
    return {key: value for key, value in summary.items() if key != "config"}


def values(output_dir, measure):
    """Metric -> checkpoint -> value."""
    metrics = load_summary(output_dir)["measures"][measure]["metrics"]
    return {name: {key: each["value"] for key, each in estimates.items()} for name, estimates in metrics.items()}


def refused(settings, capsys, monkeypatch):
    """Run the recipe as a command; its exit code must say that it failed. The one line it prints."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--config", str(CONFIG), *settings])
    assert evaluate.main() == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_one_command_leaves_numbers_rows_completions_and_plots(overrides, capsys):
    output_dir = run(overrides)
    summary = load_summary(output_dir)
    assert list(summary["checkpoints"]) == ["base", "ebft", "tuned"]
    fingerprints = {name: each["fingerprint"] for name, each in summary["checkpoints"].items()}
    assert fingerprints["ebft"] == fingerprints["tuned"] != fingerprints["base"]
    for measure in summary["measures"].values():
        for estimates in measure["metrics"].values():
            assert estimates["base"]["differences"] == {}
            assert estimates["ebft"] == estimates["tuned"]
            assert estimates["ebft"]["differences"].keys() == {"base"}
    assert summary["measures"]["completions"]["groups"] == 3
    assert summary["measures"]["translation"]["notes"]["bleu"].startswith(
        "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
    )
    assert {path.name for path in (output_dir / "plots").iterdir()} == {"calibration.png", "token_entropy.png"}
    lines = (output_dir / "completions" / "completions" / "base.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in lines) == [f"record {i}" for i in range(7)]
    assert {len(json.loads(line)["completions"]) for line in lines} == {3}
    shown = capsys.readouterr().out
    for name in ("cross_entropy: 10 rows, 10 groups", "feature_matching_loss_unbiased/4", "pass@2", "nrefs:1"):
        assert name in shown


def test_stopping_and_going_on_changes_nothing_and_repeats_nothing(overrides, tmp_path):
    straight = results(run(overrides))
    halves = [*overrides, f"output_dir={tmp_path / 'halves'}"]
    output_dir = run([*halves, "~checkpoints.ebft", "~checkpoints.tuned"])
    (output_dir / "rows" / "calibration" / "base.json").unlink()
    kept = output_dir / "rows" / "completions" / "base.json"
    before = kept.stat().st_mtime_ns
    assert results(run(halves)) == straight
    assert kept.stat().st_mtime_ns == before


CHEAP = ["~measures.calibration", "~measures.token_entropy", "~measures.completions"]


def test_differences_to_any_checkpoint_come_from_what_was_measured_before(overrides, capsys):
    settings = [*overrides, *CHEAP]
    kept = run(settings) / "rows" / "cross_entropy" / "base.json"
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    summary = load_summary(run([*settings, "compare_with=[ebft,base]"]))
    assert kept.stat().st_mtime_ns == before
    estimates = summary["measures"]["cross_entropy"]["metrics"]["cross_entropy"]
    assert {name: list(each["differences"]) for name, each in estimates.items()} == {
        "base": ["ebft"],
        "ebft": ["base"],
        "tuned": ["ebft", "base"],
    }
    assert estimates["tuned"]["differences"]["ebft"] == {"value": 0, "interval": [0, 0]}
    to_base, to_ebft = (estimates[name]["differences"][other] for name, other in (("ebft", "base"), ("base", "ebft")))
    assert to_base["value"] == -to_ebft["value"] != 0
    assert summary["compare_with"] == ["ebft", "base"]
    shown = capsys.readouterr().out
    assert "minus ebft" in shown
    assert "10 groups, minus base" in shown


def test_other_code_is_measured_again_and_says_so(overrides, monkeypatch, caplog):
    settings = [*overrides, *CHEAP, "~checkpoints.ebft", "~checkpoints.tuned"]
    rows = run(settings) / "rows"
    kept = {name: rows / name / "base.json" for name in ("cross_entropy", "translation")}
    before = {name: path.stat().st_mtime_ns for name, path in kept.items()}
    monkeypatch.setattr(CrossEntropy, "REVISION", CrossEntropy.REVISION + 1)
    with caplog.at_level("INFO"):
        run(settings)
    assert "base: cross_entropy is measured again: code is not what it was" in caplog.text
    assert "base: translation is measured again" not in caplog.text
    after = {name: path.stat().st_mtime_ns for name, path in kept.items()}
    assert after["cross_entropy"] > before["cross_entropy"]
    assert after["translation"] == before["translation"]
    assert json.loads(kept["cross_entropy"].read_text())["key"]["code"] == {"version": __version__, "revision": 2}
    monkeypatch.setattr(evaluate, "__version__", "0.0.0")
    run(settings)
    assert kept["translation"].stat().st_mtime_ns > before["translation"]


def test_a_result_without_its_code_is_not_taken(overrides):
    settings = [*overrides, *CHEAP, "~checkpoints.ebft", "~checkpoints.tuned", "~measures.translation"]
    path = run(settings) / "rows" / "cross_entropy" / "base.json"
    whole, body = path.read_text(), json.loads(path.read_text())
    del body["key"]["code"], body["checksum"]
    text = json.dumps(body, sort_keys=True)
    path.write_text(json.dumps(body | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))
    run(settings)
    assert path.read_text() == whole


def test_overwriting_measures_all_again_and_removes_what_evaluations_wrote_alone(overrides):
    settings = [*overrides, *CHEAP]
    output_dir = run(settings)
    (output_dir / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (output_dir / "rows").rglob("*.json")}
    run([*settings, "~checkpoints.ebft", "resume=overwrite"])
    after = {path: path.stat().st_mtime_ns for path in (output_dir / "rows").rglob("*.json")}
    assert {path.stem for path in after} == {"base", "tuned"}
    assert all(after[path] > before[path] for path in after)
    assert (output_dir / "notes.txt").read_text() == "mine"


def test_what_users_can_mend_is_one_sentence_and_our_own_mistakes_keep_their_traceback(overrides, monkeypatch, capsys):
    settings = [*overrides, *CHEAP, "~measures.translation"]
    options = "batch_size: 2, dataset: '${measures.cross_entropy.dataset}'"
    empty = f"measures.empty={{_component_: tests.recipes.parts.Empty, {options}}}"
    broken = f"measures.broken={{_component_: tests.recipes.parts.Broken, {options}}}"
    message = refused([*settings, empty], capsys, monkeypatch)
    assert message == (
        "error: measures.empty: no row of its dataset has anything to measure (padding, tokens); give it other rows"
    )
    stop()
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--config", str(CONFIG), *settings, broken])
    assert evaluate.main() == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ValueError: too many values to unpack" in error


def test_other_weights_or_settings_are_measured_again(overrides, material, tmp_path):
    directory = tmp_path / "changing"
    shutil.copytree(material[0] / "base", directory)
    settings = [*overrides, "~checkpoints.ebft", "~measures.calibration", "~measures.token_entropy"]
    settings += [f"checkpoints.tuned={directory}"]
    before = values(run(settings), "cross_entropy")["cross_entropy"]
    assert before["tuned"] == before["base"]
    shutil.copy(material[0] / "tuned" / "model.safetensors", directory)
    shutil.copy(material[0] / "tuned" / "config.json", directory)
    after = values(run(settings), "cross_entropy")["cross_entropy"]
    assert after["base"] == before["base"] != after["tuned"]
    other = values(run([*settings, "measures.cross_entropy.dataset.max_rows=9"]), "cross_entropy")["cross_entropy"]
    assert other["base"] != after["base"]


def test_a_damaged_result_is_named_in_one_sentence(overrides, capsys, monkeypatch):
    settings = [*overrides, "~measures.calibration", "~measures.token_entropy", "~measures.completions"]
    path = run(settings) / "rows" / "cross_entropy" / "base.json"
    capsys.readouterr()
    for damage in (path.read_text()[:-20], path.read_text().replace("0.0", "1.0", 1).replace("39", "38", 1), "[]"):
        path.write_text(damage)
        said = refused(settings, capsys, monkeypatch)
        assert said.startswith(f"error: {path} is damaged; delete it, and it is measured again")
        stop()


def test_two_processes_find_what_one_finds(overrides, tmp_path):
    """Ten and seven rows, in batches of 8, 3 and 2: the shares of the ranks are filled up."""
    settings = [*overrides, "~checkpoints.ebft", "measures.cross_entropy.batch_size=5"]
    alone = run(settings)
    assert finish(launch(2, command, [*settings, f"output_dir={tmp_path / 'two'}"])) == [0, 0]
    for measure in load_summary(alone)["measures"]:
        for checkpoint in ("base", "tuned"):
            one, two = (
                json.loads((directory / "rows" / measure / f"{checkpoint}.json").read_text())["scores"]
                for directory in (alone, tmp_path / "two")
            )
            assert one["groups"] == two["groups"]
            for metric, rows in one["sums"].items():
                for row, other in zip(rows, two["sums"][metric], strict=True):
                    assert row == pytest.approx(other, abs=1e-5, rel=1e-5), metric
    for path in sorted((alone / "completions").rglob("*.jsonl")):
        assert path.read_text() == (tmp_path / "two" / path.relative_to(alone)).read_text()


def trained(material, directory, *settings):
    """A run of ``recipes/ebft.py`` that validates; its last validation."""
    checkpoint, corpus = material[0] / "base", material[1]
    recipe = EBFTRecipe(
        load_config(
            QUICKSTART,
            [
                f"model.checkpoint_dir={checkpoint}",
                f"dataset.source.path={corpus}",
                f"validation.dataset.source.path={corpus}",
                f"output_dir={directory}",
                "dataset.seq_len=48",
                "validation.dataset.max_rows=8",
                "validation.generator.anchors.stride=16",
                "max_steps=2",
                "optimizer.lr=3.0e-3",
                "~metric_logger",
                *settings,
            ],
        )
    )
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return load_validations(directory)[2]


def test_a_run_is_measured_as_it_validated_itself_with_adapters_and_without(material, tmp_path, capsys, monkeypatch):
    """Same rows, anchors and random numbers; feature-matching losses at the length of training."""
    checkpoint, corpus = material[0] / "base", material[1]
    lora = [
        "model=components.models.load_lora_decoder",
        "model.apply_lora_to_mlp=true",
        "optimizer.lr=0.05",
        "checkpointer.save_merged=false",
    ]
    validated = {
        "full": trained(material, tmp_path / "full"),
        "adapted": trained(material, tmp_path / "adapted", *lora),
    }
    settings = [
        f"checkpoints={{base: {checkpoint}, ebft: {checkpoint}, full: {tmp_path / 'full'}}}",
        f"measures.cross_entropy.dataset.source.path={corpus}",
        "measures.cross_entropy.dataset.seq_len=48",
        "measures.cross_entropy.dataset.max_rows=8",
        "measures.calibration.generator.rollout_len=8",
        "measures.calibration.generator.temperature=0.6",
        "measures.calibration.lengths=[2,8]",
        "~measures.token_entropy",
        f"output_dir={tmp_path / 'evaluation'}",
        "resamples=10",
    ]
    assert "holds adapters alone; write a node with components.models.load_lora_decoder" in refused(
        [*settings, f"checkpoints.adapted={tmp_path / 'adapted'}"], capsys, monkeypatch
    )
    stop()
    node = [
        "_component_: components.models.load_lora_decoder",
        f"checkpoint_dir: {checkpoint}",
        f"adapter_dir: {tmp_path / 'adapted' / 'step_000002' / 'adapter'}",
        "apply_lora_to_mlp: true",
    ]
    output_dir = run([*settings, f"checkpoints.adapted={{{', '.join(node)}}}"])
    measured = values(output_dir, "cross_entropy") | values(output_dir, "calibration")
    for name, validation in validated.items():
        assert measured["cross_entropy"][name] == pytest.approx(validation["cross_entropy"].mean(), abs=1e-5)
        for loss in ("feature_matching_loss", "feature_matching_loss_whitened"):
            assert measured[f"{loss}/8"][name] == pytest.approx(validation[loss].mean(), abs=1e-4)
    assert len({round(value, 4) for value in measured["cross_entropy"].values()}) == 3


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("checkpoints.ebft=nowhere", "checkpoints.ebft: there is no directory 'nowhere'; correct the path"),
        (
            "checkpoints.ebft=tests",
            "checkpoints.ebft: 'tests' is neither a Hugging Face directory (no config.json) nor",
        ),
        ("checkpoints.ebft=3", "checkpoints.ebft is 3; name a directory"),
        ("checkpoints=nowhere", "checkpoints is 'nowhere'; write 'name: ...'"),
        ("~model", "model: this key is missing"),
        (
            "model.checkpoint_dir=nowhere",
            "model.checkpoint_dir: the directories stand under checkpoints; remove the key",
        ),
        ("model.dtpe=fp32", "did you mean 'dtype'?"),
        ("device=tpu", "device is 'tpu'; choose one of cpu, cuda"),
        ("dtype=fp16", "dtype is 'fp16'"),
        ("seed=-1", "seed is -1"),
        ("resamples=0", "resamples is 0"),
        ("resume=never", "resume is 'never'; choose one of auto, overwrite"),
        ("compare_with=[sft]", "compare_with is ['sft']; list some of the checkpoints, each once: base, ebft, tuned"),
        ("compare_with=base", "compare_with is 'base'; list some of the checkpoints"),
        ("compare_with=[]", "compare_with is []"),
        ("compare_with=[base,base]", "compare_with is ['base', 'base']"),
        ("measure.x=1", "did you mean 'measures'?"),
        ("measures.cross_entropy.region=answers", "measures.cross_entropy.region"),
        (
            "measures.cross_entropy.batch_size=100",
            "measures.cross_entropy: the dataset has 10 rows, fewer than one batch",
        ),
        (
            "measures.calibration.lengths=[1,2]",
            "measures.calibration: lengths are [1, 2] and generator.rollout_len is 4",
        ),
        ("measures.calibration.generator.num_samples=1", "the unbiased loss is one of pairs"),
        ("measures.token_entropy.generator.temperature=0", "a greedy policy has no entropy"),
        ("measures.completions.ks=[4]", "ks are [4] with generator.num_samples 3"),
        ("measures.completions.generator.temperature=0", "all samples would be alike"),
        ("measures.completions.generator.stop_tokens=[]", "generator.stop_tokens is empty"),
        ("measures.completions.generator.rollout_len=300", "measures.completions reaches position 3"),
        ("measures.translation.generator.num_samples=2", "a corpus has one translation of each text"),
        ("measures.translation.comet=Unbabel/wmt22-comet-da", "the package unbabel-comet is not installed"),
    ],
)
def test_mistakes_are_refused_before_anything_is_measured(overrides, setting, message, capsys, monkeypatch):
    output_dir = Path(overrides[-1].removeprefix("output_dir="))
    assert message in refused([*overrides, setting], capsys, monkeypatch)
    assert not output_dir.exists()


@pytest.mark.parametrize("vocabulary", ["smaller", "other"])
def test_a_checkpoint_of_another_vocabulary_is_refused(overrides, material, tmp_path, vocabulary, capsys, monkeypatch):
    directory = tmp_path / "stranger"
    if vocabulary == "smaller":
        write_checkpoint(directory, vocab_size=61)
        message = "checkpoints.ebft has 61 tokens and the tokenizer"
    else:
        shutil.copytree(material[0] / "base", directory)
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
        message = "checkpoints.ebft has another vocabulary than checkpoints.base (tokenizer.json)"
    assert message in refused([*overrides, f"checkpoints.ebft={directory}"], capsys, monkeypatch)


@pytest.mark.parametrize("path", sorted(CONFIG.parent.glob("*evaluate*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    check_evaluation(load_config(path))


def test_a_stream_is_no_dataset_to_measure_on(overrides, material, capsys, monkeypatch):
    source = f"{{_component_: components.data.stream_text, path: {material[1]}}}"
    node = f"{{_component_: components.data.StreamedText, seq_len: 40, source: {source}}}"
    settings = ["~measures.token_entropy.dataset", f"measures.token_entropy.dataset={node}"]
    message = refused([*overrides, *settings], capsys, monkeypatch)
    assert "measures.token_entropy.dataset: StreamedText is no Rows" in message


def test_prompts_and_verifiers_of_training_serve_evaluation(overrides, tmp_path):
    """``PromptCompletion`` and ``ExactMatch``; the prompts are those of the file, and their groups are the bootstrap's."""
    path = tmp_path / "records.jsonl"
    rows = [{"id": f"r{i}", "group": f"g{i // 2}", "prompt": f"def f{i}", "completion": "(x, y):"} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = (
        "{_component_: components.data.PromptCompletion, seq_len: 24, "
        f"source: {{_component_: components.data.load_records, path: {path}}}}}"
    )
    settings = ["~measures.completions.dataset", f"measures.completions.dataset={dataset}"]
    settings += ["measures.completions.verifier={_component_: components.rewards.ExactMatch}"]
    output_dir = run([*overrides, *settings, "~measures.calibration", "~measures.token_entropy", "~checkpoints.ebft"])
    found = load_summary(output_dir)["measures"]["completions"]
    assert (found["rows"], found["groups"]) == (6, 3)
    assert found["metrics"]["score"]["base"]["value"] == 0
    lines = (output_dir / "completions" / "completions" / "base.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} == {row["prompt"] for row in rows}


def test_completions_need_records_and_an_anchor_at_the_end_of_the_prompt(overrides, capsys, monkeypatch):
    records = "measures.completions.dataset=${measures.cross_entropy.dataset}"
    assert "dataset gives no records" in refused([*overrides, records], capsys, monkeypatch)
    stop()
    anchors = "measures.completions.generator.anchors=${measures.calibration.generator.anchors}"
    assert "generator.anchors is StridedAnchors" in refused([*overrides, anchors], capsys, monkeypatch)
