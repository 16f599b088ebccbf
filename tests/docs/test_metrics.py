"""docs/metrics.md: what runs log is on the page, and what is on the page is logged."""

import re

import pytest
import torch

from components.evaluation import load_validations
from components.rewards import FeatureMatchingReward
from components.types import Features
from tests.docs.pages import read, rows, sections
from tests.recipes.test_completions import completions, rlvr  # noqa: F401
from tests.recipes.test_ebft import material, overrides, train  # noqa: F401

PAGE = "docs/metrics.md"
NAMES = {name for cells in rows(sections(PAGE)["What is logged"], 3) for name in re.findall(r"`([^`]+)`", cells[0])}


@pytest.fixture
def logged(overrides, completions, tmp_path):  # noqa: F811
    """Names that three tiny runs log: EBFT with all that the loss can have, RLVR, SFT."""
    schedules = [
        f"loss.{name}={{_component_: components.schedules.Linear, start: 1.0, end: 0.5, steps: 4}}"
        for name in ("rl_coef", "ce_coef", "kl_coef")
    ]
    reference = "{_component_: components.features.NetworkReference}"
    ebft = [*overrides, *schedules, f"reference={reference}", "feature_extractor.network.keep_head=true"]
    verifier = "{_component_: components.rewards.ExactMatch, reference_column: answer}"
    runs = [ebft, rlvr(completions, verifier), [*overrides, "~validation", "loss.rl_coef=0", "loss.ce_coef=1"]]
    names = set()
    for number, settings in enumerate(runs):
        recipe, _, log = train([*settings, "max_steps=1", f"output_dir={tmp_path / str(number)}"])
        names |= {name for row in log for name in row} - {"step"}
        names |= {name for measured in load_validations(recipe.output_dir).values() for name in measured}
    return names


def test_the_page_has_what_is_logged_and_nothing_else(logged):
    assert logged == NAMES


def test_symptoms_speak_of_metrics_there_are():
    for symptom, *_ in rows(sections(PAGE)["Symptoms"], 3):
        for name in re.findall(r"`([a-z_/]+)`", symptom):
            assert name in NAMES | {"dtype"}


@pytest.mark.parametrize(("different", "alignment", "diversity"), [(4, 1.0, 0.0), (1, 2.0, 0.5)])
def test_whitened_alignment_and_diversity_have_the_bounds_that_the_page_gives(different, alignment, diversity):
    """Four samples, all different or all copies, and the truth in their middle: 2/sqrt(r) for r different ones; copies pay
    2/n."""
    rollout = torch.eye(4)[torch.arange(4) % different][None, :, None]  # [1, n, 1, D]
    features = Features(rollout=rollout, target=rollout.mean(dim=1), mask=torch.ones(1, 1, dtype=torch.bool))
    metrics = FeatureMatchingReward()(None, None, features).metrics
    assert metrics["alignment"] == pytest.approx(alignment)
    assert metrics["diversity"] == pytest.approx(diversity)
    assert "at most 2/√r" in read(PAGE)
    assert "2/n where all are copies" in read(PAGE)
