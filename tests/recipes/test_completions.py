"""Runs whose rollouts are whole completions: RLVR, and EBFT of completions, from prompts and answers."""

import json
import math

import pytest
import torch

from components.rewards import SandboxError
from components.rollouts import CompletionAnchor
from components.training import stop
from tests.recipes.test_bad_input import refused
from tests.recipes.test_ebft import build, material, overrides, train  # noqa: F401

WORDS = ("red", "green", "blue", "cyan")


def broken_sandbox():
    """A verifier whose sandbox stops working in its first call."""

    def verifier(completions, records):
        raise SandboxError("the sandbox cannot run a program")

    return verifier


class ShareOfE:
    """A verifier of the test: how much of the answer is the letter e."""

    def __call__(self, completions, records):
        assert all(record["answer"] in WORDS for record in records)
        return [text.count("e") / max(len(text), 1) for text in completions]


@pytest.fixture
def completions(overrides, tmp_path):  # noqa: F811
    """The quickstart on questions and answers, one a row, with rollouts of whole answers."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"colour {i}?", "answer": WORDS[i % 4], "number": i} for i in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = (
        "dataset={_component_: components.data.PromptCompletion, seq_len: 32, prompt_column: question, "
        f"completion_column: answer, source: {{_component_: components.data.load_records, path: {path}}}}}"
    )
    generator = (
        "generator={_component_: components.rollouts.BlockParallelGenerator, rollout_len: 8, num_samples: 4, "
        "temperature: 1.0, stop_tokens: ['<eos>'], anchors: {_component_: components.rollouts.CompletionAnchor}}"
    )
    kept = [each for each in overrides if not each.startswith(("dataset", "validation"))]
    return [*kept, "~validation", "~dataset", "~generator", dataset, generator, "batch_size=8"]


def rlvr(settings, verifier):
    reward = f"reward={{_component_: components.rewards.VerifierReward, verifier: {verifier}}}"
    return [*settings, "~reward", "~feature_extractor", reward, "loss.ce_coef=0"]


def test_rlvr_learns_what_its_verifier_rewards(completions):
    """Reward of the last ten steps against that of the first ten, in standard errors of their difference."""
    verifier = "{_component_: tests.recipes.test_completions.ShareOfE}"
    _, _, log = train([*rlvr(completions, verifier), "max_steps=40", "save_every_n_steps=40"])
    early, late = (torch.tensor([row["reward"] for row in rows]) for rows in (log[:10], log[-10:]))
    error = math.sqrt(float(early.var() + late.var()) / 10)
    assert float(late.mean() - early.mean()) > 4 * error
    assert {"solved", "completion_length"} <= log[0].keys()
    assert "feature_matching_loss" not in log[0]
    assert "seconds/features" in log[0]


def test_whole_completions_are_matched_in_feature_space(completions):
    recipe, _, log = train([*completions, "max_steps=2", "loss.ce_coef=0.1"])
    assert isinstance(recipe.generator.anchors, CompletionAnchor)
    assert all(math.isfinite(row["feature_matching_loss"]) for row in log)
    assert log[0]["logprob_gap"] < 1e-5


def test_a_completion_starts_where_its_prompt_ends_and_stops_at_the_stop_token(completions):
    recipe = build(completions)
    batch = next(recipe.stream)
    rollouts = recipe.generator(recipe.policy, batch, recipe.rng)
    stop()
    for row, record in enumerate(batch.records):
        prompt = recipe.tokenizer.encode(record["question"])
        assert rollouts.anchors[row].tolist() == [len(prompt)]
        assert batch.tokens[row, : len(prompt)].tolist() == prompt
    ended = (rollouts.tokens == recipe.tokenizer.eos_id) & rollouts.mask
    assert (ended.sum(dim=-1) <= 1).all()
    assert torch.equal(rollouts.mask.sum(dim=-1) < 8, ended[..., :-1].any(dim=-1))


def test_a_verifier_needs_records(completions, tmp_path, capsys, monkeypatch):
    settings = [*rlvr(completions, "{_component_: components.rewards.ExactMatch}"), "dataset.packed=true"]
    text = refused(settings, capsys, monkeypatch)
    assert "reward needs the records that rows were made from" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "generator.anchors={_component_: components.rollouts.StridedAnchors, stride: 8, context_len: 8}",
            "generator has StridedAnchors as anchors, and reward judges whole completions",
        ),
        ("generator.stop_tokens=[]", "generator has no stop_tokens, and reward judges whole completions"),
    ],
)
def test_a_verifier_needs_whole_completions(completions, tmp_path, capsys, monkeypatch, setting, said):
    settings = rlvr(completions, "{_component_: tests.recipes.test_completions.ShareOfE}")
    text = refused([*settings, *(["~generator.anchors"] if "anchors" in setting else []), setting], capsys, monkeypatch)
    assert said in text
    assert not (tmp_path / "run").exists()


def validating(settings, *nodes):
    """A setting that validates on the rows trained on."""
    dataset = next(each for each in settings if each.startswith("dataset="))
    return f"validation={{every_n_steps: 1, batch_size: 8, {', '.join([dataset, *nodes]).replace('=', ': ')}}}"


def test_so_does_one_of_validation(completions, capsys, monkeypatch):
    verifier = (
        "{_component_: components.rewards.VerifierReward, verifier: {_component_: components.rewards.ExactMatch}}"
    )
    settings = [*completions, validating(completions, f"reward={verifier}"), "generator.stop_tokens=[]"]
    assert "validation.generator has no stop_tokens" in refused(settings, capsys, monkeypatch)


def test_a_verifiers_reward_knows_the_stop_tokens_of_the_generator_whose_rollouts_it_is_given(completions):
    settings = rlvr(completions, "{_component_: components.rewards.ExactMatch}")
    generator = next(each for each in completions if each.startswith("generator="))
    recipe = build([*settings, validating(completions, generator.replace("<eos>", ";"))])
    eos, semicolon = recipe.tokenizer.eos_id, recipe.tokenizer.encode(";")[-1]
    assert (recipe.reward.stop_tokens, recipe.measuring.reward.stop_tokens) == ({eos}, {semicolon})
    stop()
    recipe = build([*settings, validating(completions)])
    assert recipe.measuring.reward is recipe.reward
    stop()


def test_a_sandbox_that_stops_working_ends_the_run_in_one_sentence(completions, capsys, monkeypatch):
    settings = rlvr(completions, "{_component_: tests.recipes.test_completions.broken_sandbox}")
    assert "the sandbox cannot run a program" in refused([*settings, "max_steps=1"], capsys, monkeypatch)
