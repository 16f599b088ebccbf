"""Pages of finished runs: what is in them, and that they need nothing else. More in tests/unit/test_pages*.py."""

import json
import re

import pytest

from components.report import report_page
from components.training import forget_rollouts, load_rollouts, stop
from tests.recipes.test_cli import ebft
from tests.recipes.test_ebft import build, material, overrides, train  # noqa: F401


def data_of(page):
    """The data that a page carries."""
    return json.loads(re.search(r'<script[^>]*type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL).group(1))


@pytest.fixture(scope="module")
def runs(material, tmp_path_factory):  # noqa: F811
    """Two runs that differ in one key."""
    folder = tmp_path_factory.mktemp("runs")
    checkpoint, corpus = material
    for name, gamma in (("plain", 0.0), ("mixed", 0.1)):
        settings = [f"model.checkpoint_dir={checkpoint}", f"dataset.source.path={corpus}", "dataset.seq_len=48"]
        settings += [f"validation.dataset.source.path={corpus}", "validation.dataset.max_rows=8", "~metric_logger"]
        train([*settings, "max_steps=2", f"output_dir={folder / name}", f"loss.ce_coef={gamma}"])
    return folder


def test_a_report_has_curves_changes_and_differences(runs):
    page = report_page([runs / "plain", runs / "mixed"], runs / "report.html").read_text()
    data = data_of(page)
    assert [run["name"] for run in data["runs"]] == ["plain", "mixed"]
    assert len(data["runs"][0]["training"]["reward"]) == 2
    assert {change["metric"] for change in data["runs"][1]["changes"]} >= {"cross_entropy", "feature_matching_loss"}
    assert data["differences"] == [["loss.ce_coef", "0.0", "0.1"]]
    assert sum(data["runs"][0]["seconds"].values()) > 0


def test_pages_need_no_network(runs):
    report_page([runs / "plain"], runs / "one.html")
    done = ebft("rollouts", str(runs / "plain"), cwd=runs)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sample 1" in done.stdout
    for page in (runs / "one.html", runs / "plain" / "rollouts.html"):
        text = page.read_text()
        assert not re.search(r"""(src|href)\s*=\s*["']?https?:|@import|url\(\s*["']?http""", text)
        assert "default-src 'none'" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    done = ebft("report", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "is no run" in done.stderr
    assert "Traceback" not in done.stderr


def test_rollouts_are_kept_as_often_as_asked_and_forgotten_by_a_resume(overrides):  # noqa: F811
    settings = [*overrides, "keep_rollouts_every_n_steps=2", "save_every_n_steps=3", "~validation"]
    recipe = build(settings)
    recipe.train()
    stop()
    assert list(load_rollouts(recipe.output_dir)) == [2, 4]
    forget_rollouts(recipe.output_dir, after=3)
    assert list(load_rollouts(recipe.output_dir)) == [2]
