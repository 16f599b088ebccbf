"""The pages in a browser: no error, no request, no overflow, and controls that do what they say.

Needs an installed chromium; skipped without, but not in continuous integration, which installs it.
"""

import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

from components.report import report_page, rollouts_page
from components.training import MetricsLog
from tests.pages import HOSTILE, write_evaluation, write_rollouts, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None and "CI" not in os.environ:
    pytest.skip("needs an installed chromium: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        # --no-sandbox: a container's root may not make namespaces, and the pages are ours.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = [write_run(folder / "a"), write_run(folder / "b", lr=3e-5, shift=1.0)]
    write_rollouts(write_rollouts(runs[0], 1), 9, rows=2)
    report = report_page([*runs, write_evaluation(folder / "eval")], folder / "report.html")
    return {"rollouts": rollouts_page(runs[0]), "report": report}


@pytest.fixture
def opened(browser, files):
    """Opens a page; at the end of the test nothing may have been complained of or asked for besides the file itself."""
    contexts, complaints, requests = [], [], []

    def open_page(name, width=1280, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(files[name].as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert set(requests) <= {path.as_uri() for path in files.values()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["rollouts", "report"])
def test_a_page_fits_and_stays_what_it_is(opened, name, width, scheme):
    page = opened(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert "broken" not in page.title()
    assert page.locator("img").count() == 0
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    assert (sum(map(int, before[4:-1].split(","))) < 300) == (scheme == "dark")
    page.click("#theme")
    assert page.evaluate(colour) != before


def anchors(page):
    return page.locator("#anchors tbody tr td:first-child").all_inner_texts()


def samples(page):
    return [int(item.get_attribute("data-sample")) for item in page.locator("#samples li").all()]


def test_rollouts_are_shown_as_they_were_kept(opened):
    page = opened("rollouts")
    assert page.input_value("#step") == "1"  # the newest
    assert anchors(page) == ["2", "5", "11"]
    assert HOSTILE.replace("\u2028", "") in page.locator("#reading").text_content().replace("\u2028", "")
    assert HOSTILE in page.locator("#samples li .tokens").first.text_content()
    assert page.locator(".mark.void").count() == 1
    assert page.locator("#samples .advantage").all_inner_texts() == ["−0.50", "+0.50"]


def test_sorting_reorders_anchors_and_samples(opened):
    page = opened("rollouts")
    page.select_option("#sort", "reward-high")
    assert anchors(page) == ["11", "5", "2"]  # means 2, 1, 0.5
    page.locator("#anchors tbody tr").nth(2).click()
    assert page.inner_text("#anchor") == "Anchor at token 2"
    assert samples(page) == [1, 0]
    assert page.locator("#anchor").bounding_box()["y"] > 0  # brought back into the window
    page.select_option("#sort", "reward-low")
    assert anchors(page) == ["2", "5", "11"]
    assert samples(page) == [0, 1]
    page.select_option("#sort", "alignment-high")  # means 2.5, 1.25, 0.5
    assert anchors(page) == ["11", "5", "2"]
    page.select_option("#sort", "copies")
    assert anchors(page)[0] == "11"
    assert samples(page) == [1, 0]


def test_filters_hide_samples_and_anchors_without_any(opened):
    page = opened("rollouts")
    page.fill("#least-reward", "1.5")
    assert anchors(page) == ["5", "11"]
    assert samples(page) == [0]
    page.fill("#least-alignment", "3")
    assert anchors(page) == ["5"]
    page.fill("#least-alignment", "4")
    assert anchors(page) == []
    assert page.inner_text("#anchor") == "No anchor passes the filters"
    page.fill("#least-alignment", "")
    page.fill("#least-reward", "")
    page.select_option("#copies", "only")
    assert anchors(page) == ["11"]
    assert samples(page) == [1]
    page.select_option("#copies", "without")
    assert anchors(page) == ["2", "5", "11"]
    page.locator("#anchors tbody tr").last.click()
    assert samples(page) == [0]


def test_steps_texts_and_anchors_are_reached_by_mouse_and_keys(opened):
    page = opened("rollouts")
    assert page.locator("#text option").count() == 2
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#anchor") == "Anchor at token 5"
    page.locator("#reading span", has_text="é").click()  # belongs to the anchor before it
    assert page.inner_text("#anchor") == "Anchor at token 5"
    page.locator("#reading .mark.void").click()
    assert "does not count" in page.inner_text("#sees")
    page.keyboard.press("[")
    assert page.input_value("#step") == "0"
    assert not page.locator("#text").is_visible()  # a single one
    page.keyboard.press("l")
    assert page.locator("#samples rt").first.inner_text() == "−0.1"
    page.keyboard.press("s")
    assert page.input_value("#sort") == "reward-high"


def test_a_block_sees_its_own_document_only(opened):
    page = opened("rollouts")
    page.locator("#anchors tbody tr").last.click()  # token 11; its document begins at 9
    assert "see the 2 tokens" in page.inner_text("#sees")
    assert page.locator("#reading span:not(.unseen)").all_inner_texts()[:2] == ["<b>", "x"]


def test_the_report_shows_curves_tables_and_values_under_the_pointer(opened):
    page = opened("report")
    assert page.locator("main > section > h2").all_inner_texts() == [
        "Before and after",
        "Validation",
        "Training",
        "Advantages",
        "Time and memory",
        "eval: heldout",
        "Config",
    ]
    assert "−0.5000 ± 0.2887" in page.inner_text("#changes")
    assert page.locator("#differences tbody tr").all_inner_texts() == ["optimizer.lr\t1e-05\t3e-05"]
    cells = page.locator("#evaluation-0 tbody tr").nth(1).locator("td").all_inner_texts()
    assert (cells[0], *cells[2:]) == ("", "3.0000", "3.0000 to 3.0000", "+1.0000", "+1.0000 to +1.0000", "", "")
    curves = page.locator("#evaluation-0 figure")
    assert curves.count() == 3  # the values, and differences to both checkpoints
    # A line each for two checkpoints, or one for that which is not compared with itself, in two pieces.
    assert [curve.locator("polyline").count() for curve in curves.all()] == [4, 2, 2]
    reward = page.locator("#training figure", has_text="reward")
    assert reward.locator("polyline").count() == 2
    reward.scroll_into_view_if_needed()
    box = reward.locator("svg").first.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 50)  # near the left edge: step 1
    assert reward.locator(".readout").inner_text().split() == ["step", "1", "0.100", "1.100"]
    reward.focus()
    page.keyboard.press("ArrowRight")
    assert reward.locator(".readout").inner_text().split()[:2] == ["step", "2"]
    page.locator("#legend button").first.click()
    assert reward.locator("polyline").count() == 1


def test_advantages_are_two_ribbons_around_their_median(opened):
    """At step 9 of two texts -2, -0.5, 0, 0, 0.5, 2 of each: 90 % lie from -2 to 2, 50 % from -0.5 to 0.5."""
    figure = opened("report").locator("#advantages figure")
    assert figure.count() == 1  # of the run that kept rollouts
    assert figure.locator(".area").count() == 2
    areas = [shape.get_attribute("points").split() for shape in figure.locator(".area").all()]
    wide, narrow = ([float(point.split(",")[1]) for point in area] for area in areas)
    assert len(wide) == len(narrow) == 4  # there and back over two steps
    assert max(wide) - min(wide) == pytest.approx(4 * (max(narrow) - min(narrow)), rel=0.01)
    assert figure.locator(".bar").count() == 0
    assert figure.locator(".readout").inner_text().split()[:2] == ["step", "9"]
    assert "0 (−2.000 to 2.000)" in figure.locator(".readout").inner_text()


def test_long_curves_have_a_running_mean_with_an_interval_and_memory_is_said(browser, tmp_path):
    """In 100 steps the reward alternates between 0 and 1; a window of 5 on each side holds 11 of them, at step 50 six ones."""
    log = MetricsLog(tmp_path)
    for step in range(1, 101):
        log.append(step, {"reward": step % 2, "seconds/step": 2.0, "peak_memory_gib": 1 + step / 100})
    page = browser.new_page()
    page.goto(report_page([tmp_path], tmp_path / "report.html").as_uri())
    reward = page.locator("#training figure", has_text="reward")
    assert reward.locator(".area").count() == 1
    curve = page.evaluate("smooth(data.runs[0].training.reward)[49]")
    spread = 1.96 * (11 * (6 / 11) * (5 / 11) / 10 / 11) ** 0.5
    assert curve == pytest.approx([50, 6 / 11, 6 / 11 - spread, 6 / 11 + spread])
    assert "2.0 s a step, 2.0 GiB at the peak" in page.inner_text("#time")
    page.close()


def test_reports_print_in_black_on_white(opened):
    page = opened("report", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not page.locator("#theme").is_visible()
