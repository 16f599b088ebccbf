"""Runs of the recipe with a reference, and with coefficients that follow schedules."""

import pytest
import torch

from components.models import load_decoder
from components.training import stop
from tests.recipes.test_ebft import build, material, numbers, overrides, train  # noqa: F401

OWN = (
    "reference={_component_: components.models.ReferencePolicy, decoder: {_component_: components.models.load_decoder, "
    "checkpoint_dir: '${model.checkpoint_dir}', dtype: '${dtype}'}}"
)
SHARED = ("reference={_component_: components.features.NetworkReference}", "feature_extractor.network.keep_head=true")
FEW = ("max_steps=2", "~validation", "gradient_accumulation_steps=2")


@pytest.fixture(autouse=True)
def _leave_group():
    yield
    stop()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_before_the_first_update_the_policy_is_its_reference(overrides, dtype):  # noqa: F811
    """Exactly: the same forward over the same weights. After it, it is not."""
    _, _, log = train([*overrides, *FEW, OWN, "loss.kl_coef=0.1", f"dtype={dtype}"])
    assert log[0]["kl"] == 0
    assert log[1]["kl"] != 0
    assert log[0]["seconds/reference"] > 0


def test_a_network_shared_with_the_features_is_the_same_reference(overrides, tmp_path):  # noqa: F811
    """Same numbers and weights, bitwise: features read what they did, and the head is that of the checkpoint."""
    _, own, own_log = train([*overrides, *FEW, OWN, "loss.kl_coef=0.1"])
    recipe, shared, shared_log = train(
        [*overrides, *FEW, *SHARED, "loss.kl_coef=0.1", f"output_dir={tmp_path / 'two'}"]
    )
    assert numbers(shared_log) == numbers(own_log)
    assert all(torch.equal(shared[name], own[name]) for name in own)
    assert recipe.reference.policy.decoder is recipe.feature_extractor.network.decoder
    before = load_decoder(recipe.cfg.model.checkpoint_dir).state_dict()
    after = recipe.reference.policy.decoder.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_resumed_run_goes_on_in_its_schedules(overrides, tmp_path):  # noqa: F811
    schedules = (
        "loss.kl_coef={_component_: components.schedules.DelayedWarmup, value: 0.1, delay: 1, warmup: 1}",
        "loss.ce_coef={_component_: components.schedules.Linear, start: 0.4, end: 0.0, steps: 4}",
    )
    settings = [*overrides, *SHARED, *schedules, "~validation"]
    _, straight, straight_log = train(settings)
    assert [row["kl_coef"] for row in straight_log] == pytest.approx([0, 0.05, 0.1, 0.1])
    assert [row["ce_coef"] for row in straight_log] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert "rl_coef" not in straight_log[0]
    halves = [*settings, f"output_dir={tmp_path / 'halves'}"]
    recipe = build(halves)
    for _ in range(2):
        metrics = recipe.step([next(recipe.stream)])
        recipe.steps_done += 1
        recipe.metrics_log.append(recipe.steps_done, metrics)
    recipe.save()
    stop()
    _, resumed, resumed_log = train(halves)
    assert numbers(resumed_log) == numbers(straight_log)
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.kl_coef=0.1"], "loss.kl_coef and reference"),
        ([OWN], "loss.kl_coef and reference"),
        ([SHARED[0], "loss.kl_coef=0.1"], "reference: the feature network has no head .*keep_head to true"),
        (["loss.kl_coef=-0.1"], "kl_coef -0.1"),
        (["loss.kl_coef=much"], "loss.kl_coef: .* wants float"),
        (["loss.kl_estimator=k4"], "loss.kl_estimator"),
        (
            ["loss.ce_coef={_component_: components.schedules.Linear, start: 0.1, end: -0.1, steps: 4}"],
            "loss.ce_coef: start is 0.1 and end -0.1",
        ),
        (
            ["loss.ce_coef={_component_: components.schedules.Linear, start: 0.1, end: 0, step: 4}"],
            "did you mean 'steps'",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_at_the_start(overrides, settings, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        build([*overrides, *settings])


def test_the_feature_network_is_the_reference_where_no_reward_reads_it(overrides):  # noqa: F811
    """As in RLVR with a KL term."""
    reward = ("~reward", "reward={_component_: tests.recipes.test_baselines.Copies}")
    recipe = build([*overrides, *SHARED, *FEW, *reward, "loss.kl_coef=0.1"])
    assert recipe.reference is not None
    recipe.train()
    with pytest.raises(ValueError, match="feature_extractor: this key is missing, and reference uses its network"):
        build([*overrides, *SHARED[:1], *FEW, *reward, "loss.kl_coef=0.1", "~feature_extractor", "resume=overwrite"])
