"""Measures against their obvious twins: one plain forward per row, one generator per length, one verifier call per sample."""

import copy
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from components.blocks import CompletionAnchor, StridedAnchors
from components.data import batch_loader, load_tokenizer
from components.evaluation import (
    Calibration,
    Completions,
    CrossEntropy,
    NothingToMeasure,
    TokenEntropy,
    Translation,
    block_losses,
    compare,
    load_scores,
    row_groups,
    run_measure,
    save_found,
    validate,
)
from components.features import FrozenNetwork, HiddenStateFeatures
from components.models import Policy
from components.rewards import FeatureMatchingReward
from components.rollouts import BlockParallelGenerator
from components.training import start, stop
from components.types import Batch, Features, Rollouts
from tests.checkpoints import write_checkpoint
from tests.recipes.parts import Digits, Prompts
from tests.tiny import target_row_by_row, tiny_batch, tiny_decoder, tiny_rollouts


@pytest.fixture(autouse=True)
def _group():
    start("cpu")
    yield
    stop()


class FourRows:
    """Rows of one to three documents, with padding; completions begin at the fourth token."""

    fingerprint = "four rows"

    def __init__(self):
        self.batch = tiny_batch(B=4, documents=((24,), (10, 8, 6), (20,), (16, 5)))

    def __len__(self):
        return 4

    def __getitem__(self, index):
        doc_ids = self.batch.doc_ids[index]
        return {
            "tokens": self.batch.tokens[index],
            "doc_ids": doc_ids,
            "target_mask": (doc_ids >= 0) & (torch.arange(24) >= 4),
        }


def generator(**changes):
    options = {
        "anchors": StridedAnchors(stride=3, context_len=2, document_mask=True),
        "rollout_len": 5,
        "num_samples": 3,
        "temperature": 0.7,
    }
    return BlockParallelGenerator(**(options | changes))


def measure(measured, decoder=None):
    policy = Policy(decoder or tiny_decoder())
    return run_measure(measured, policy, name="m", device=torch.device("cpu"), seed=5)


def drawn(gen, seed=5, batch_size=2):
    """The batches of the rows above and what a generator draws for them under the seed of ``measure``."""
    rows, rng, policy = FourRows(), torch.Generator().manual_seed(seed), Policy(tiny_decoder())
    for start_ in range(0, 4, batch_size):
        items = [rows[i] for i in range(start_, start_ + batch_size)]
        batch = Batch(**{key: torch.stack([item[key] for item in items]) for key in items[0]})
        yield batch, gen(policy, batch, rng)


@pytest.mark.parametrize("region", ["all", "target"])
def test_cross_entropy_is_that_of_plain_forwards(region):
    found = measure(CrossEntropy(dataset=FourRows(), batch_size=3, region=region)).scores
    rows = FourRows()
    logprobs = target_row_by_row(tiny_decoder(), rows.batch).detach()
    for row in range(4):
        doc_ids = rows.batch.doc_ids[row]
        tokens = [t for t in range(1, 24) if doc_ids[t] == doc_ids[t - 1] >= 0 and (region == "all" or t >= 4)]
        total, weight = found.sums["cross_entropy"][row]
        assert weight == len(tokens)
        assert total == pytest.approx(-sum(float(logprobs[row, t - 1]) for t in tokens), abs=1e-3)


@torch.no_grad()
def test_entropies_are_those_of_plain_forwards():
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch, n=2, G=3, stride=5)
    decoder, got = tiny_decoder(), Policy(tiny_decoder()).entropies(batch, rollouts, (1.0, 0.5))
    B, n, K, G = rollouts.tokens.shape
    for b, j, k in itertools.product(range(B), range(n), range(K)):
        anchor = int(rollouts.anchors[b, k])
        seen = batch.doc_ids[b, :anchor] == batch.doc_ids[b, anchor - 1]
        row = torch.cat((batch.tokens[b, :anchor][seen], rollouts.tokens[b, j, k]))
        logits = decoder(row[None])[0, -G - 1 : -1]
        for number, temperature in enumerate((1.0, 0.5)):
            expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
            torch.testing.assert_close(got[number, b, j, k], expected, atol=1e-4, rtol=1e-4)


def test_token_entropy_is_over_rollout_tokens_and_cross_entropy_over_the_tokens_in_their_place():
    gen = generator(stop_tokens=[1, 2, 3, 4, 5, 6, 7, 8])
    found = measure(TokenEntropy(dataset=FourRows(), batch_size=2, generator=gen)).scores
    plain = Policy(tiny_decoder())
    row = 0
    for batch, rollouts in drawn(gen):
        entropies = plain.entropies(batch, rollouts, (1.0, 0.7))
        truth = target_row_by_row(tiny_decoder(), batch).detach()
        for b in range(2):
            for k in range(5):
                counted = rollouts.mask[b, ..., k]
                for name, values in (("entropy", entropies[0]), ("entropy_sampling", entropies[1])):
                    total, weight = found.sums[f"{name}/{k + 1}"][row]
                    assert weight == int(counted.sum())
                    assert total == pytest.approx(float(values[b, ..., k][counted].sum()), abs=1e-3)
                # The anchors' document_mask leaves only windows inside one document.
                anchors = [int(a) for a, m in zip(rollouts.anchors[b], rollouts.mask[b, 0, :, 0], strict=True) if m]
                total, weight = found.sums[f"cross_entropy/{k + 1}"][row]
                assert weight == len(anchors)
                assert total == pytest.approx(-sum(float(truth[b, a + k - 1]) for a in anchors), abs=1e-3)
            row += 1
    assert row == 4


def test_a_point_that_no_rollout_reaches_has_no_value_and_the_curve_goes_on_without_it():
    """Every token stops, so that nothing is written behind the first; the ground truth has all five."""
    found = measure(TokenEntropy(dataset=FourRows(), batch_size=2, generator=generator(stop_tokens=list(range(61)))))
    estimates = compare({"a": found.scores}, compare_with=["a"], resamples=10, seed=0)
    values = {metric: each["a"].value for metric, each in estimates.items()}
    assert [values[f"entropy/{k}"] is None for k in range(1, 6)] == [False, True, True, True, True]
    assert all(values[f"cross_entropy/{k}"] is not None for k in range(1, 6))


def test_at_the_sampling_temperature_of_one_both_entropies_are_one():
    found = measure(TokenEntropy(dataset=FourRows(), batch_size=2, generator=generator(temperature=1.0))).scores
    assert found.sums["entropy/2"] == found.sums["entropy_sampling/2"]


def extractor(**options):
    return HiddenStateFeatures(network=FrozenNetwork(decoder=tiny_decoder(seed=3)), **options)


POOLINGS = [
    {"pooling": "last_token"},
    {"pooling": "mean"},
    {"pooling": "concat"},
    {"pooling": "mean", "combine": "stack"},
]


@pytest.mark.parametrize("options", POOLINGS, ids=str)
def test_the_loss_at_a_length_is_that_of_a_generator_of_this_length_with_the_same_tokens(options):
    """And what the training reward reports for it: the features of shorter rollouts, from a forward of their own."""
    gen = generator(stop_tokens=[1, 2, 3, 4, 5, 6, 7, 8])
    features = extractor(**options)
    found = measure(
        Calibration(dataset=FourRows(), batch_size=2, generator=gen, feature_extractor=features, lengths=[1, 3, 5])
    ).scores
    for length in (1, 3, 5):
        row = 0
        for batch, rollouts in drawn(gen):
            shorter = Rollouts(
                tokens=rollouts.tokens[..., :length],
                mask=rollouts.mask[..., :length],
                anchors=rollouts.anchors,
                logprobs=rollouts.logprobs[..., :length],
            )
            whole = features(batch, shorter)
            for b in range(2):
                one = Features(
                    rollout=whole.rollout[b : b + 1], target=whole.target[b : b + 1], mask=whole.mask[b : b + 1]
                )
                expected = FeatureMatchingReward()(batch, shorter, one).metrics
                for name in ("feature_matching_loss", "feature_matching_loss_whitened"):
                    total, weight = found.sums[f"{name}/{length}"][row]
                    assert weight == int(one.mask.sum()) > 0
                    assert total / weight == pytest.approx(expected[name], abs=2e-5)
                row += 1


def test_the_unbiased_loss_is_the_mean_over_pairs_of_distinct_samples():
    torch.manual_seed(0)
    features = Features(
        rollout=torch.randn(2, 4, 3, 6), target=torch.randn(2, 3, 6), mask=torch.ones(2, 3, dtype=torch.bool)
    )
    unbiased = block_losses(features, "none")["feature_matching_loss_unbiased"]
    for b in range(2):
        for k in range(3):
            phi, y = features.rollout[b, :, k], features.target[b, k]
            pairs = [float((phi[i] - y) @ (phi[j] - y)) for i in range(4) for j in range(4) if i != j]
            assert float(unbiased[b, k]) == pytest.approx(sum(pairs) / 12, abs=1e-5)


def test_more_samples_lower_the_plug_in_loss_but_not_the_unbiased_one():
    """Features of mean 0 and variance 1 in 8 dimensions, truth at 0: the loss is 0, and the plug-in is 8 / n too large. Over
    4000 blocks the means have standard errors below 0.04."""
    generator_ = torch.Generator().manual_seed(0)
    for n in (2, 8):
        features = Features(
            rollout=torch.randn(1, n, 4000, 8, generator=generator_),
            target=torch.zeros(1, 4000, 8),
            mask=torch.ones(1, 4000, dtype=torch.bool),
        )
        losses = block_losses(features, "none")
        assert float(losses["feature_matching_loss"].mean()) == pytest.approx(8 / n, abs=0.15)
        assert float(losses["feature_matching_loss_unbiased"].mean()) == pytest.approx(0, abs=0.15)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_checkpoint(tmp_path_factory.mktemp("tokenizer") / "checkpoint"))


STOPS = list(range(40))


def completing(**changes):
    return generator(**({"anchors": CompletionAnchor(), "rollout_len": 8, "stop_tokens": STOPS} | changes))


def vocabulary(tokenizer):
    return tiny_decoder(vocab_size=tokenizer.vocab_size)


def test_greedy_completions_are_those_of_plain_forwards_whatever_batch_they_are_in(tokenizer):
    """Prompts of seven lengths, cut to the longest of each batch: against one unpadded argmax loop per prompt."""
    gen = completing(temperature=0.0, num_samples=1)
    dataset, decoder = Prompts(tokenizer=tokenizer), vocabulary(tokenizer)
    found = measure(
        Completions(dataset=dataset, batch_size=3, generator=gen, verifier=Digits(), tokenizer=tokenizer), decoder
    )
    texts = {text["id"]: text for text in found.texts}
    finished = 0
    for index, record in enumerate(dataset.records):
        tokens, written = list(dataset.encoded[index][0]), []
        while len(written) < 8 and not (written and written[-1] in STOPS):
            written.append(int(decoder(torch.tensor([tokens + written]))[0, -1].argmax()))
        ended = written[-1] in STOPS
        finished += ended
        text = tokenizer.decode(written[:-1] if ended else written)
        assert texts[record["id"]]["completions"] == [text]
        assert texts[record["id"]]["prompt"] == record["prompt"]
        assert texts[record["id"]]["scores"] == Digits()([text], [record])
    assert sum(row[0] for row in found.scores.sums["finished"]) == finished
    assert 0 < finished < 7  # both ways of ending are seen


class TwoFiles(FourRows):
    """The same, from two files."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"group": "aabb"[index]}


def test_rows_are_of_their_groups_and_else_each_of_its_own():
    assert measure(CrossEntropy(dataset=TwoFiles(), batch_size=3)).scores.groups == ["a", "a", "b", "b"]
    assert measure(CrossEntropy(dataset=FourRows(), batch_size=3)).scores.groups == [f"row {i}" for i in range(4)]


def test_validation_keeps_the_groups_of_rows_for_every_metric():
    for dataset, groups in ((TwoFiles(), ["a", "a", "b", "b"]), (FourRows(), None)):
        found = validate(
            Policy(tiny_decoder()),
            batch_loader(dataset, batch_size=3, seed=0, shuffle=False),
            generator(),
            HiddenStateFeatures(network=FrozenNetwork(tiny_decoder())),
            FeatureMatchingReward(),
            seed=0,
        )
        assert {"cross_entropy", "feature_matching_loss", "duplicate_rollouts"} < found.keys()
        assert all(entry.groups == groups for entry in found.values())


def test_scores_of_rows_in_other_groups_are_measured_again(tmp_path):
    found = measure(CrossEntropy(dataset=TwoFiles(), batch_size=3))
    save_found(tmp_path, "m", "base", found, {"seed": 0})
    assert load_scores(tmp_path, "m", "base", {"seed": 0}, row_groups(TwoFiles())) == found.scores
    assert load_scores(tmp_path, "m", "base", {"seed": 0}, row_groups(FourRows())) is None


def test_pass_at_k_is_over_samples_with_full_marks(tokenizer):
    gen = completing(temperature=1.0, num_samples=4)
    found = measure(
        Completions(
            dataset=Prompts(tokenizer=tokenizer),
            batch_size=2,
            generator=gen,
            verifier=Digits(),
            tokenizer=tokenizer,
            ks=[1, 2],
        ),
        vocabulary(tokenizer),
    )
    counts = [sum(len(text) % 2 == 0 for text in row["completions"]) for row in found.texts]
    assert len(set(counts)) > 1
    assert [row[0] for row in found.scores.sums["pass@1"]] == [pytest.approx(count / 4) for count in counts]
    # Two of four are both wrong in C(4 - c, 2) of 6 pairs.
    wrong_pairs = [(4 - count) * (3 - count) / 2 for count in counts]
    assert [row[0] for row in found.scores.sums["pass@2"]] == [pytest.approx(1 - pairs / 6) for pairs in wrong_pairs]
    assert [row[0] for row in found.scores.sums["score"]] == [pytest.approx(2 + count / 2) for count in counts]
    assert found.scores.groups == [f"group {int(row['id'][-1]) % 3}" for row in found.texts]


class Copier:
    """A generator of the test that writes the reference, but for the first token of every second completion."""

    anchors, rollout_len, num_samples, temperature, stop_tokens = CompletionAnchor(), 12, 1, 0.0, [0]

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, policy, batch, rng):
        tokens = torch.zeros(len(batch.tokens), 1, 1, 12, dtype=torch.long)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, record in enumerate(batch.records):
            ids = self.tokenizer.encode(record["completion"])
            ids = [*(ids[1:] if int(record["id"][-1]) % 2 else ids), 0]
            tokens[row, 0, 0, : len(ids)] = torch.tensor(ids)
            mask[row, 0, 0, : len(ids)] = True
        anchors = self.anchors(batch, 12).positions
        return Rollouts(tokens=tokens, mask=mask, anchors=anchors, logprobs=torch.zeros(tokens.shape))


class Sentences(Prompts):
    """Longer references, so that there are n-grams to share."""

    fingerprint = "sentences"

    def __init__(self, *, tokenizer):
        super().__init__(tokenizer=tokenizer)
        for number, record in enumerate(self.records):
            record["completion"], record["source"] = f"x y z {number} + y z", "quelle"


def test_translations_are_scored_as_sacrebleu_scores_them_on_its_command_line(tokenizer, tmp_path):
    measured = Translation(
        dataset=Sentences(tokenizer=tokenizer), batch_size=2, generator=Copier(tokenizer), tokenizer=tokenizer
    )
    found = measure(measured)
    for key in ("completion", "reference"):
        (tmp_path / key).write_text("".join(text[key] + "\n" for text in found.texts))
    command = [sys.executable, "-m", "sacrebleu", "reference", "-i", "completion", "-m", "bleu", "chrf", "-w", "6"]
    shown = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    for name, theirs in zip(("bleu", "chrf"), shown, strict=True):
        sums = torch.tensor(found.scores.sums[name]).sum(dim=0).long().tolist()
        ours = measured.metrics[name]._compute_score_from_stats(sums).score
        assert 20 < ours < 100
        assert ours == pytest.approx(theirs["score"], abs=1e-6)
        assert measured.notes[name] == theirs["signature"]


def test_comet_scores_segments_where_its_package_is_installed(tokenizer, monkeypatch):
    """The package is another's, and stands in here by what is called of it."""

    class Model:
        def predict(self, data, gpus, progress_bar):
            return types.SimpleNamespace(
                scores=[float(each["mt"] == each["ref"] and each["src"] == "quelle") for each in data]
            )

    package = types.SimpleNamespace(
        download_model=lambda name: f"{name}.ckpt", load_from_checkpoint=lambda path: Model()
    )
    monkeypatch.setitem(sys.modules, "comet", package)
    measured = Translation(
        dataset=Sentences(tokenizer=tokenizer),
        batch_size=2,
        generator=Copier(tokenizer),
        tokenizer=tokenizer,
        comet="Unbabel/wmt22-comet-da",
    )
    found = measure(measured)
    assert sum(row[0] for row in found.scores.sums["comet"]) == 4  # of 7, those with an even number
    assert measured.notes["comet"] == "Unbabel/wmt22-comet-da"


def test_the_measure_in_the_documentation_works():
    source = re.search(
        r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(), re.DOTALL
    )
    exec(source[1], namespace := {})
    found = measure(namespace["Padding"](dataset=FourRows(), batch_size=3))
    assert found.scores.sums["padding"] == [[0, 24], [0, 24], [4, 24], [3, 24]]


def test_a_prompt_without_tokens_is_refused(tokenizer):
    dataset = Prompts(tokenizer=tokenizer)
    dataset.encoded[2] = ([], dataset.encoded[2][1])
    with pytest.raises(ValueError, match="row 2 of dataset has no prompt"):
        Completions(dataset=dataset, batch_size=1, generator=completing(), verifier=Digits(), tokenizer=tokenizer)


def test_weights_that_diverged_are_named():
    decoder = copy.deepcopy(tiny_decoder())
    decoder.norm.scale.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="measures.m: cross_entropy is not finite"):
        measure(CrossEntropy(dataset=FourRows(), batch_size=2), decoder)


def test_a_dataset_with_nothing_to_measure_is_refused():
    class Prompts_(FourRows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            return row | {"target_mask": torch.zeros_like(row["target_mask"])}

    with pytest.raises(
        NothingToMeasure, match=r"measures.m: no row of its dataset has anything to measure \(cross_entropy"
    ):
        measure(CrossEntropy(dataset=Prompts_(), batch_size=2))
