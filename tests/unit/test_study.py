"""The study's configs are runs that the recipes accept, and its tables say what its result files do."""

from pathlib import Path

import pytest

from benchmarks.study import TASKS, ablations, final, grid
from benchmarks.study_report import ABLATIONS, COLUMNS, NAMES, SECTIONS, fill, length_table, result_table, reward_table
from components.evaluation import check_evaluation
from components.training import check_recipe, load_config

ROOT = Path(__file__).parents[2]


def test_every_run_is_one_that_the_recipe_accepts_and_has_a_folder_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    runs = final(TASKS) + ablations(TASKS)
    for run in runs:
        check_recipe(load_config(run.config, run.overrides))
    assert len({run.output_dir for run in runs}) == len(runs)


def test_the_best_half_run_is_continued_by_the_final_one(monkeypatch):
    monkeypatch.chdir(ROOT)
    halves = {run.output_dir: run.max_steps for run in grid(TASKS)}
    for run in final(TASKS):
        if run.overrides == ("seed=1",) and run.config.stem != "sft_long":
            assert halves[run.output_dir] * 2 == run.max_steps


@pytest.mark.parametrize("task", SECTIONS)
def test_evaluations_are_accepted(task, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_evaluation(load_config(f"configs/study/{task}/evaluate.yaml"))


def test_every_ablation_is_evaluated_and_has_a_name(monkeypatch):
    monkeypatch.chdir(ROOT)
    evaluated = load_config("configs/study/ablations/evaluate.yaml").checkpoints
    assert {name.removesuffix("_seed_1") for name in evaluated} == set(ABLATIONS)
    runs = {run.config.stem: run for run in ablations(TASKS)}
    assert {"base", "reference"} | set(runs) == set(ABLATIONS)


def found(value, **differences):
    """A checkpoint's part of ``results.json``; differences are ``(value, low, high)``."""
    return {
        "value": value,
        "interval": None if value is None else [value - 1, value + 1],
        "differences": {
            other: {"value": difference, "interval": [low, high]}
            for other, (difference, low, high) in differences.items()
        },
    }


def test_arms_are_compared_with_sft_of_the_same_seed():
    metrics = {
        "base": found(2.0, sft_seed_1=(0.5, 0.4, 0.6), sft_seed_2=(0.3, 0.2, 0.4)),
        "sft_seed_1": found(1.5, base=(-0.5, -0.6, -0.4), sft_seed_2=(-0.2, -0.3, -0.1)),
        "sft_seed_2": found(1.7, base=(-0.3, -0.4, -0.2), sft_seed_1=(0.2, 0.1, 0.3)),
        "ebft_0_seed_1": found(1.4, sft_seed_1=(-0.1, -0.2, 0.1), sft_seed_2=(-0.3, -0.4, -0.2)),
        "ebft_0_seed_2": found(1.3, sft_seed_1=(-0.2, -0.3, -0.1), sft_seed_2=(-0.4, -0.5, -0.3)),
        "rlvr_seed_1": found(None, sft_seed_1=(None, None, None)),
    }
    lines = result_table({"m/x": ("x", 1)}, NAMES, {"m": {"metrics": {"x": metrics}}}, against="sft").splitlines()
    assert lines[2:] == [
        "| untuned | 2.0 (**+0.5, +0.3**) |",
        "| SFT, same sequences | 1.6 |",
        "| RLVR | – |",
        "| EBFT, gamma 0 | 1.4 (-0.1, -0.4) |",
    ]


def test_a_table_is_bold_where_the_intervals_of_all_seeds_agree():
    def estimate(value, difference, low, high):
        return found(value, base=(difference, low, high))

    metrics = {
        "base": found(2.0),
        "sft_seed_1": estimate(1.5, -0.5, -0.6, -0.4),
        "sft_seed_2": estimate(1.7, -0.3, -0.4, -0.2),
        "ebft_0_seed_1": estimate(1.9, -0.1, -0.2, -0.01),
        "ebft_0_seed_2": estimate(2.1, 0.1, -0.1, 0.3),
    }
    measures = {
        "cross_entropy": {"metrics": {"cross_entropy": metrics}},
        "feature_matching": {"metrics": {"feature_matching_loss_unbiased/8": metrics}},
    }
    lines = result_table(COLUMNS["code"], NAMES, measures).splitlines()
    assert lines[2].startswith("| untuned | 2.000 (1.000 to 3.000) |")
    assert lines[3].startswith("| SFT, same sequences | 1.600 (**-0.500, -0.300**) |")
    assert lines[4].startswith("| EBFT, gamma 0 | 2.000 (-0.100, +0.100) |")
    assert len(lines) == 5
    page = "a\n<!-- study: code -->\nold\n<!-- end -->\nb\n<!-- study: other -->\nkept\n<!-- end -->\n"
    assert fill(page, {"code": "new"}) == page.replace("old", "new")


def test_losses_by_length_are_means_over_seeds():
    def metric(*values):
        return {
            name: {"value": value} for name, value in zip(("base", "sft_seed_1", "sft_seed_2"), values, strict=True)
        }

    metrics = {
        "feature_matching_loss/1": metric(9, 9, 9),
        "feature_matching_loss_unbiased/1": metric(2.0, 1.0, 1.5),
        "feature_matching_loss_unbiased/16": metric(1.0, 0.5, None),
    }
    assert length_table(NAMES, {"metrics": metrics}).splitlines() == [
        "| | 1 | 16 |",
        "|---|---|---|",
        "| untuned | 2.0000 | 1.0000 |",
        "| SFT, same sequences | 1.2500 | – |",
    ]


def test_rewards_of_the_first_and_the_last_third_are_compared_with_their_spread_over_steps():
    runs = [
        {"arm": "rlvr", "seed": 2, "training_reward": [1.0, 3.0, 9.0, 9.0, 6.0, 8.0]},
        {"arm": "sft", "seed": 1, "training_reward": [None] * 6},
    ]
    lines = reward_table({"runs": runs}).splitlines()
    # Both thirds have variance 2, hence the error sqrt(2/2 + 2/2).
    assert lines[2:] == ["| RLVR | 2 | 2.0000 | 7.0000 | +5.0000 ± 1.4142 |"]
