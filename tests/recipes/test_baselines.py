"""SFT and RLVR are the same recipe with other YAML: what they leave out, and what they are equal to."""

import pytest
import torch

from components.evaluation import load_validations
from components.features import NoFeatures
from components.models import load_decoder
from components.rollouts import NoRollouts
from components.training import load_config, stop
from components.types import Rewards
from recipes.ebft import EBFTRecipe
from tests.recipes.test_bad_input import refused
from tests.recipes.test_ebft import QUICKSTART, build, material, overrides, train  # noqa: F401

SFT = ["loss.rl_coef=0", "loss.ce_coef=1"]


class Copies:
    """A reward of the test that needs no features: the share of a rollout's tokens that are the ground truth's."""

    uses_features = False

    def __call__(self, batch, rollouts, features):
        assert features.rollout.shape[-1] == 0
        G = rollouts.tokens.shape[-1]
        window = rollouts.anchors[..., None] + torch.arange(G)
        truth = batch.tokens.gather(1, window.flatten(1)).view(window.shape)
        share = (rollouts.tokens == truth[:, None]).float().mean(dim=-1) * features.mask[:, None]
        mean = float(share.transpose(1, 2)[features.mask].mean()) if features.mask.any() else 0.0
        return Rewards(pointwise=share, pairwise=torch.zeros_like(share), mask=features.mask, metrics={"reward": mean})


def test_sft_is_the_plain_loop(overrides):  # noqa: F811
    """Ten steps; cross-entropy of every step and the weights at the end, against torchtune's own forward and AdamW."""
    settings = [*overrides, *SFT, "max_steps=10", "lr_scheduler.warmup=0", "dataset.isolate_documents=false"]
    recipe, weights, log = train(settings)
    cfg = recipe.cfg

    again = build([*settings, "resume=overwrite"])
    stop()
    decoder = load_decoder(cfg.model.checkpoint_dir)
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=cfg.optimizer.lr, betas=tuple(cfg.optimizer.betas), weight_decay=0.0
    )
    for row in log:
        tokens = next(again.stream).tokens
        logits = decoder(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert row["cross_entropy"] == pytest.approx(float(loss.detach()), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), cfg.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in decoder.state_dict().items():
        torch.testing.assert_close(weights[f"decoder.{name}"], value, atol=1e-5, rtol=1e-4)


def test_sft_makes_neither_rollouts_nor_features_but_validates_with_them(overrides):  # noqa: F811
    recipe, _, log = train([*overrides, *SFT, "max_steps=40", "save_every_n_steps=40"])
    assert isinstance(recipe.generator, NoRollouts)
    assert isinstance(recipe.feature_extractor, NoFeatures)
    assert not {"reward", "policy_loss", "duplicate_rollouts", "logprob_gap", "advantage_std"} & log[0].keys()
    before, after = load_validations(recipe.output_dir).values()
    assert {"feature_matching_loss", "alignment", "cross_entropy"} <= before.keys()
    change = after["cross_entropy"].change_since(before["cross_entropy"])
    assert change.mean() < -5 * change.standard_error()


def test_sft_needs_no_generator_reward_or_features_in_its_yaml(overrides):  # noqa: F811
    left_out = ["~generator", "~feature_extractor", "~reward", "~advantage", "~validation.generator"]
    full, weights, _ = train([*overrides, *SFT])
    bare, same, _ = train([*overrides, *SFT, *left_out, "resume=overwrite"])
    assert all(torch.equal(same[name], weights[name]) for name in weights)
    assert set(load_validations(bare.output_dir)[0]) == {"cross_entropy"}


def test_features_that_nothing_reads_take_no_memory(overrides):  # noqa: F811
    recipe = build([*overrides, *SFT, "~validation"])
    assert isinstance(recipe.feature_extractor, NoFeatures)
    assert not recipe.frozen


def test_a_reward_without_features_leaves_the_network_out(overrides):  # noqa: F811
    settings = ["reward={_component_: tests.recipes.test_baselines.Copies}", "~feature_extractor", "~validation"]
    cfg = load_config(QUICKSTART, [*overrides, "~reward", *settings])
    recipe = EBFTRecipe(cfg)
    recipe.setup()
    metrics = recipe.step([next(recipe.stream)])
    stop()
    assert isinstance(recipe.feature_extractor, NoFeatures)
    assert 0 <= metrics["reward"] <= 1


def test_validation_may_judge_by_another_reward(overrides):  # noqa: F811
    settings = [
        "~reward",
        "reward={_component_: tests.recipes.test_baselines.Copies}",
        "validation.reward={_component_: components.rewards.FeatureMatchingReward}",
    ]
    recipe, _, log = train([*overrides, *settings, "max_steps=1"])
    assert "feature_matching_loss" not in log[0]
    assert "feature_matching_loss" in load_validations(recipe.output_dir)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["~reward"], "reward: this key is missing; add it, or set loss.rl_coef to 0"),
        (["~feature_extractor"], "feature_extractor: this key is missing, and the reward reads features"),
    ],
)
def test_parts_that_do_not_fit_together(settings, message, overrides, tmp_path, capsys, monkeypatch):  # noqa: F811
    assert message in refused([*overrides, *settings], capsys, monkeypatch)
    assert not (tmp_path / "run").exists()
