"""What each measure finds on a tiny policy, with the ``REVISION`` under which it is kept.

A failure says that stored results would be taken for what the code does not measure any more. If that is meant, raise
``REVISION`` of the measure and write the new numbers here.
"""

import pytest
import torch

from components import evaluation
from components.blocks import CompletionAnchor, StridedAnchors
from components.data import load_tokenizer
from components.evaluation import Measure, compare, run_measure
from components.features import FrozenNetwork, HiddenStateFeatures
from components.models import Policy
from components.rollouts import BlockParallelGenerator
from components.training import start, stop
from tests.checkpoints import write_checkpoint
from tests.recipes.parts import Digits, Prompts
from tests.tiny import tiny_decoder

# Measure -> its REVISION, and what it finds.
FOUND = {
    "Calibration": (
        1,
        {
            "feature_matching_loss/1": 1.2033,
            "feature_matching_loss/4": 1.2266,
            "feature_matching_loss_unbiased/1": 0.96866,
            "feature_matching_loss_unbiased/4": 0.93329,
            "feature_matching_loss_whitened/1": 0.32851,
            "feature_matching_loss_whitened/4": 0.31825,
        },
    ),
    "Completions": (
        1,
        {"pass@1": 0.47619, "pass@2": 0.71429, "score": 0.7381, "finished": 0.42857, "tokens": 6.8571},
    ),
    "CrossEntropy": (1, {"cross_entropy": 6.0906}),
    "TokenEntropy": (
        1,
        {
            "entropy/1": 4.7924,
            "entropy/2": 4.6983,
            "entropy/3": 4.7164,
            "entropy/4": 4.719,
            "entropy_sampling/1": 4.3216,
            "entropy_sampling/2": 4.1961,
            "entropy_sampling/3": 4.2417,
            "entropy_sampling/4": 4.2389,
            "cross_entropy/1": 7.6257,
            "cross_entropy/2": 5.6923,
            "cross_entropy/3": 6.4349,
            "cross_entropy/4": 6.3857,
        },
    ),
    "Translation": (1, {"bleu": 0.0, "chrf": 0.83333, "finished": 0.28571, "tokens": 6.7143}),
}


@pytest.fixture(autouse=True)
def _group():
    start("cpu")
    yield
    stop()


def options(name, tokenizer):
    """The arguments of a measure besides its rows."""
    drawn = {"num_samples": 3, "temperature": 0.8, "stop_tokens": list(range(20))}
    strided = BlockParallelGenerator(anchors=StridedAnchors(stride=3, context_len=2), rollout_len=4, **drawn)
    completing = {"anchors": CompletionAnchor(), "rollout_len": 8}
    network = FrozenNetwork(decoder=tiny_decoder(seed=3, vocab_size=tokenizer.vocab_size))
    return {
        "Calibration": {
            "generator": strided,
            "feature_extractor": HiddenStateFeatures(network=network),
            "lengths": [1, 4],
        },
        "Completions": {
            "generator": BlockParallelGenerator(**completing, **drawn),
            "verifier": Digits(),
            "tokenizer": tokenizer,
            "ks": [1, 2],
        },
        "CrossEntropy": {},
        "TokenEntropy": {"generator": strided},
        "Translation": {
            "generator": BlockParallelGenerator(**completing, **drawn | {"num_samples": 1, "temperature": 0}),
            "tokenizer": tokenizer,
        },
    }[name]


def test_every_measure_is_held():
    exported = {name: getattr(evaluation, name) for name in evaluation.__all__}
    measures = {name for name, part in exported.items() if isinstance(part, type) and issubclass(part, Measure)}
    assert measures - {"Measure"} == FOUND.keys()


@pytest.mark.parametrize("name", FOUND)
def test_a_measure_finds_what_its_revision_stands_for(name, tmp_path):
    tokenizer = load_tokenizer(write_checkpoint(tmp_path))
    measure = getattr(evaluation, name)(dataset=Prompts(tokenizer=tokenizer), batch_size=3, **options(name, tokenizer))
    policy = Policy(tiny_decoder(vocab_size=tokenizer.vocab_size))
    scores = run_measure(measure, policy, name=name, device=torch.device("cpu"), seed=1).scores
    estimates = compare({"policy": scores}, compare_with=["policy"], resamples=1, seed=0)
    values = {metric: each["policy"].value for metric, each in estimates.items()}
    revision, expected = FOUND[name]
    # Sums are rounded in another order on other machines.
    assert (measure.REVISION, values) == (revision, pytest.approx(expected, rel=1e-3)), __doc__
