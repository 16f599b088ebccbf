"""Kept rollouts: what is written is what was sampled, small, readable, and forgotten where a run resumes."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.data import load_tokenizer
from components.training import forget_rollouts, load_rollouts, save_rollouts, token_texts
from components.types import Batch, Rewards, Rollouts


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def made(tokenizer, text, anchors, drawn, *, logprob=-1.0, counts=None, padding=0):
    """A batch of one text and ``drawn`` samples (a list of texts of equal length per anchor); pointwise rewards are
    0, 1, 2, ..., pairwise ones -0.5, advantages the pointwise rewards minus their mean."""
    ids = tokenizer.encode(text)
    samples = torch.tensor([[tokenizer.encode(each) for each in block] for block in drawn]).transpose(0, 1)[None]
    _, n, K, G = samples.shape
    doc_ids = torch.tensor([[0] * len(ids) + [-1] * padding])
    counts = torch.tensor([counts or [True] * K])
    batch = Batch(tokens=torch.tensor([ids + [1] * padding]), doc_ids=doc_ids, target_mask=doc_ids >= 0)
    rollouts = Rollouts(
        tokens=samples,
        mask=counts[:, None, :, None].expand(samples.shape),
        anchors=torch.tensor([anchors]),
        logprobs=torch.full(samples.shape, logprob),
    )
    pointwise = torch.arange(n).float()[None, :, None].expand(1, n, K)
    rewards = Rewards(pointwise=pointwise, pairwise=torch.full((1, n, K), -0.5), mask=counts)
    advantages = pointwise - pointwise.mean()
    return {
        "tokenizer": tokenizer,
        "batch": batch,
        "rollouts": rollouts,
        "rewards": rewards,
        "advantages": advantages,
    }


def test_what_is_kept_is_what_was_sampled(tokenizer, tmp_path):
    parts = made(
        tokenizer, "abcdefgh", [2, 6], [["cd", "xy", "xy"], ["gh", "gh", "zz"]], counts=[True, False], padding=3
    )
    path = save_rollouts(tmp_path, 7, **parts)
    assert path == tmp_path / "rollouts" / "step_000007.json"
    assert not list(tmp_path.rglob("*.partial"))
    (text,) = load_rollouts(tmp_path)[7]
    assert text["tokens"] == list("abcdefgh")  # without the padding
    assert text["documents"] == [0] * 8
    first, second = text["blocks"]
    assert (first["anchor"], first["counts"], first["truth"]) == (2, True, ["c", "d"])
    assert (second["anchor"], second["counts"], second["truth"]) == (6, False, ["g", "h"])
    assert first["samples"][2] == {
        "tokens": ["x", "y"],
        "logprobs": [-1.0, -1.0],
        "mask": [1, 1],
        "pointwise": 2.0,
        "pairwise": -0.5,
        "advantage": 1.0,
        "copy_of": 1,
    }
    assert [sample["copy_of"] for sample in first["samples"]] == [None, None, 1]


def test_what_follows_a_stop_is_no_difference(tokenizer, tmp_path):
    parts = made(tokenizer, "abcdef", [2], [["cx", "cy", "zx"]])
    mask = torch.tensor([1, 0]).bool().expand(1, 3, 1, 2)
    rollouts = Rollouts(**{**vars(parts["rollouts"]), "mask": mask})
    save_rollouts(tmp_path, 1, **parts | {"rollouts": rollouts})
    samples = load_rollouts(tmp_path)[1][0]["blocks"][0]["samples"]
    assert [sample["mask"] for sample in samples] == [[1, 0]] * 3
    assert [sample["copy_of"] for sample in samples] == [None, 0, None]


def test_numbers_that_json_lacks_become_null(tokenizer, tmp_path):
    save_rollouts(tmp_path, 1, **made(tokenizer, "abcd", [2], [["cd", "xy"]], logprob=-torch.inf))
    sample = load_rollouts(tmp_path)[1][0]["blocks"][0]["samples"][0]
    assert sample["logprobs"] == [None, None]


def test_rows_and_steps_are_kept_in_order_and_forgotten_after_one(tokenizer, tmp_path):
    parts = made(tokenizer, "abcd", [2], [["cd", "xy"]])
    for step in (2, 10, 1):
        save_rollouts(tmp_path, step, rows=3, **parts)
    assert {step: len(texts) for step, texts in load_rollouts(tmp_path).items()} == {1: 1, 2: 1, 10: 1}
    assert list(load_rollouts(tmp_path)) == [1, 2, 10]
    forget_rollouts(tmp_path, after=2)
    assert list(load_rollouts(tmp_path)) == [1, 2]
    forget_rollouts(tmp_path / "elsewhere", after=0)  # nothing kept, nothing to forget


def test_a_text_of_1024_tokens_stays_below_300_kb(tokenizer, tmp_path):
    """127 anchors, 4 samples of 8 tokens; three characters a token is what code has."""
    text, anchors = "x" * 1024, list(range(8, 1024, 8))
    parts = made(tokenizer, text, anchors, [["abcdefgh"] * 4] * len(anchors), logprob=-12.345678)
    size = save_rollouts(tmp_path, 1, **parts).stat().st_size
    longer_tokens = 2 * (1024 + 127 * (1 + 4) * 8)
    assert size + longer_tokens < 300_000


# Surrogates are no text, and the tokenizer cannot be given them.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, context=TEXT)
def test_texts_of_tokens_joined_are_the_text_whatever_stands_before(tokenizer, text, context):
    """One token per byte, so every character beyond ASCII is split over tokens."""
    ids = tokenizer.encode(text)
    texts = token_texts(tokenizer, ids, context=tokenizer.encode(context))
    assert len(texts) == len(ids)
    assert "".join(texts) == text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 257), max_size=12), split=st.integers(0, 12))
def test_any_tokens_at_all_have_texts_that_are_unicode(tokenizer, ids, split):
    texts = token_texts(tokenizer, ids[split:], context=ids[:split])
    assert len(texts) == len(ids[split:])
    json.dumps(texts, ensure_ascii=False).encode()


def test_the_last_token_of_a_character_has_it(tokenizer):
    ids = tokenizer.encode("aé€")  # 1, 2 and 3 bytes
    assert token_texts(tokenizer, ids) == ["a", "", "é", "", "", "€"]
    assert token_texts(tokenizer, ids[2:], context=ids[:2]) == ["é", "", "", "€"]  # begun before, ended here
    assert token_texts(tokenizer, ids[:2]) == ["a", "\ufffd"]  # never ended


def test_the_space_that_a_decoder_strips_from_a_beginning_is_kept_inside_a_text():
    class Stripping:
        """As SentencePiece's: the space before the first word is not part of the text."""

        def decode(self, ids):
            return "".join(f" word{number}" for number in ids).removeprefix(" ")

    assert token_texts(Stripping(), [3, 4], context=[1, 2]) == [" word3", " word4"]
    assert token_texts(Stripping(), [3, 4]) == ["word3", " word4"]
