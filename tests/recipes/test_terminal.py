"""A whole run as a terminal shows it. More in tests/unit/test_progress.py."""

import re

from components.training import stop
from tests.recipes.test_ebft import build, material, overrides  # noqa: F401
from tests.unit.test_progress import Screen, terminal


def test_a_run_in_a_terminal_ends_with_its_numbers(overrides, monkeypatch):  # noqa: F811
    recipe = build(overrides)
    with terminal(monkeypatch) as read:
        recipe.train()
        received = read()
    stop()
    head, *numbers = Screen(received).lines
    assert re.match(r"step 4/4 ━+ +\d+\.\d s a step, \d+ tokens/s *$", head)
    titles = [line.split("  ")[0] for line in numbers]
    assert titles == ["reward", "feature-matching loss", "cross-entropy", "duplicate rollouts", ""]


def test_fine_tuning_without_rollouts_shows_what_it_has(overrides, monkeypatch):  # noqa: F811
    recipe = build([*overrides, "loss.rl_coef=0.0", "loss.ce_coef=1.0", "~validation"])
    with terminal(monkeypatch) as read:
        recipe.train()
        head, *numbers = Screen(read()).lines
    stop()
    assert "tokens/s" not in head
    assert [line.split("  ")[0] for line in numbers] == ["cross-entropy", ""]
