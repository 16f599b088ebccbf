"""Pages of finished runs: what is in them, that they need nothing else, and that no text of a run can break them."""

import json
import re
import shutil

import pytest

from components.report import report_page, rollouts_page
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


def test_evaluation_results_are_in_the_report(runs):
    estimate = {"value": 0.5, "interval": [0.4, 0.6], "difference": 0.0, "difference_interval": [0.0, 0.0]}
    alone = estimate | {"interval": None}
    measures = {"humaneval": {"metrics": {"pass@1": {"base": estimate, "sft": alone}}}}
    (runs / "plain" / "results.json").write_text(json.dumps({"schema": 1, "measures": measures}))
    data = data_of(report_page([runs / "plain"], runs / "two.html").read_text())
    (runs / "plain" / "results.json").unlink()
    assert data["runs"][0]["evaluation"] == [
        ["base", "humaneval: pass@1", 0.5, 0.4, 0.6],
        ["sft", "humaneval: pass@1", 0.5, None, None],
    ]


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


@pytest.fixture(scope="module")
def browser():
    """Chromium, where it and playwright are installed: ``pip install -e .[pages]``, and ``chromium`` of the system."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra `pages`)")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser, path, scheme, width):
    """The page in a window, and a list of what went wrong with it, which grows."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    trouble = []
    page.on("console", lambda message: trouble.append(message.text))
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file:") else trouble.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_timeout(200)
    return page, trouble


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser_are_quiet_and_no_wider_than_it(runs, browser, scheme, width):
    report_page([runs / "plain", runs / "mixed"], runs / "report.html")
    for path in (runs / "report.html", rollouts_page(runs / "plain", runs / "rollouts.html")):
        page, trouble = opened(browser, path, scheme, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()
        assert not trouble


def test_sorting_sorts_and_filtering_hides(runs, browser):
    page, trouble = opened(browser, rollouts_page(runs / "plain", runs / "rollouts.html"), "light", 1280)

    def rewards():
        texts = page.locator("#anchors tbody td:nth-child(3)").all_inner_texts()
        return [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts]

    drawn = rewards()
    page.select_option("#sort", "reward-high")
    assert rewards() == sorted(drawn, reverse=True) != drawn
    page.fill("#least-reward", "100")
    assert rewards() == []
    page.close()
    assert not trouble
