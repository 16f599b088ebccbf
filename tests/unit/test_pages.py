"""The pages as files: what is in them, that nothing is fetched, and that text of a run stays text."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.cli import main
from components.report import report_page, report_plots, rollouts_page, rollouts_table
from components.report.page import write_page
from tests.pages import HOSTILE, write_evaluation, write_rollouts, write_run

ASSETS = Path(__file__).parents[2] / "components" / "report" / "assets"


class Elements(HTMLParser):
    """Tags and attributes of a page, and the text of its data element, as a browser would find them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.data, self._inside = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = ("id", "data") in attrs

    def handle_data(self, data):
        self.data += data if self._inside else ""

    def handle_endtag(self, tag):
        self._inside = False


def data_of(path):
    return json.loads(Elements(path).data)


def test_kept_rollouts_come_back_whole_from_their_page(tmp_path):
    write_rollouts(tmp_path, 1)
    write_rollouts(tmp_path, 12, rows=2)
    path = rollouts_page(tmp_path)
    assert path == tmp_path / "rollouts.html"
    assert not list(tmp_path.glob("*.partial"))
    steps = data_of(path)["steps"]
    assert [(each["step"], len(each["texts"])) for each in steps] == [(1, 1), (12, 2)]
    assert steps[0]["texts"] == json.loads((tmp_path / "rollouts" / "step_000001.json").read_text())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20)))
def test_any_text_goes_through_a_page_unchanged_and_adds_no_element(tmp_path, texts):
    empty = Elements(write_page(tmp_path / "a.html", "rollouts", title="", data=[]))
    written = Elements(write_page(tmp_path / "b.html", "rollouts", title="".join(texts), data=texts))
    assert written.tags == empty.tags
    assert json.loads(written.data) == texts


def test_pages_fetch_nothing(tmp_path):
    write_rollouts(write_run(tmp_path / "run"))
    for path in (rollouts_page(tmp_path / "run"), report_page([tmp_path / "run"], tmp_path / "report.html")):
        found = Elements(path)
        assert not {"link", "img", "iframe", "object", "base"} & set(found.tags)
        assert not [value for name, value in found.attributes if name in ("src", "href", "srcset", "action")]
        assert "default-src 'none'" in path.read_text()
    for asset in ASSETS.iterdir():
        assert not re.search(
            r"https?:|//\w|@import|url\(|\bfetch\(", re.sub(r"^\s*//.*", "", asset.read_text(), flags=re.M)
        ), asset


def test_the_report_has_the_numbers_of_the_runs(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=3e-5, shift=1.0)]
    data = data_of(report_page(runs, tmp_path / "report.html"))
    first, second = data["runs"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert first["training"]["reward"][:2] == [[1, 0.1], [2, 0.2]]
    assert second["training"]["reward"][0] == [1, 1.1]
    assert first["seconds"] == {"rollouts": 2.0, "update": 5.0, "other": 1.0}
    assert data["differences"] == [["optimizer.lr", "1e-05", "3e-05"]]  # and not where they were written
    assert [entry[0] for entry in data["training"]] == ["reward", "lr", "odd/share"]  # kl was never a number


def test_validations_are_compared_row_by_row(tmp_path):
    """Rows changed by -1, -1, 0, 0: mean -0.5, variance 1/3, standard error sqrt(1/3 / 4)."""
    (run,) = data_of(report_page([write_run(tmp_path / "a")], tmp_path / "report.html"))["runs"]
    (change,) = run["changes"]
    assert (change["first"], change["last"], change["before"], change["after"]) == (0, 6, 2.5, 2.0)
    assert change["change"] == -0.5
    assert change["error"] == pytest.approx(12**-0.5)
    # The curve has the margin of 95 %, 1.96 standard errors.
    assert run["validation"]["cross_entropy"] == [[0, 2.5, 0.0], [6, 2.0, pytest.approx(1.959964 * 12**-0.5)]]


def test_the_spread_of_advantages_is_that_of_the_blocks_that_count(tmp_path):
    """Advantages -0.5, 0.5, 2, -2, 0, 0: the median is 0; sorted, 5 % is a quarter of the way from -2 to -0.5, 25 % a quarter
    from -0.5 to 0, by five gaps. The zeros of the block that does not count would draw the quartiles in."""
    write_rollouts(write_rollouts(write_run(tmp_path / "run"), 2), 5)
    (run,) = data_of(report_page([tmp_path / "run"], tmp_path / "report.html"))["runs"]
    spread = pytest.approx([0, -1.625, 1.625, -0.375, 0.375])
    assert [(step, found) for step, *found in run["advantages"]] == [(2, spread), (5, spread)]


def test_plots_stand_beside_the_page_if_asked(tmp_path, monkeypatch, capsys):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=1.0), write_evaluation(tmp_path / "eval")]
    write_rollouts(runs[0])
    command = ["ebft", "report", *map(str, runs), "--out", str(tmp_path / "both.html")]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert capsys.readouterr().out.split() == [str(tmp_path / "both.html")]
    monkeypatch.setattr(sys, "argv", [*command, "--png"])
    main()
    written = [Path(line) for line in capsys.readouterr().out.split()]
    names = ["training.png", "validation.png", "advantages.png", "eval/heldout.png"]
    assert written == [tmp_path / "both.html", *(tmp_path / "both" / name for name in names)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])


def test_what_a_run_lacks_is_left_out(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    data = data_of(report_page([tmp_path / "run"], tmp_path / "report.html"))
    empty = {"training": {}, "advantages": [], "seconds": {}, "validation": {}, "changes": [], "rows": 0, "groups": 0}
    assert data["runs"] == [{"name": "run"} | empty]
    assert (data["training"], data["validation"], data["evaluations"], data["differences"]) == ([], [], [], [])


def test_evaluations_stand_beside_runs_with_curves_apart(tmp_path):
    folders = [write_run(tmp_path / "run"), write_evaluation(tmp_path / "eval")]
    data = data_of(report_page(folders, tmp_path / "report.html"))
    assert len(data["runs"]) == 1
    (measure,) = data["evaluations"]
    assert (measure["name"], measure["checkpoints"]) == ("eval: heldout", ["base", HOSTILE])
    assert measure["metrics"]["cross_entropy"][HOSTILE] == {
        "value": 3.0,
        "interval": [3.0, 3.0],
        "groups": 9,
        "differences": {"base": {"value": 1.0, "interval": [1.0, 1.0]}},
    }
    assert measure["compare_with"] == ["base", HOSTILE]
    assert measure["intervals"].startswith(
        "bootstrap intervals of 95% over 9 groups, which are too narrow for fewer than 30"
    )
    assert measure["metrics"]["none"]["base"]["value"] is None
    assert {at: found["base"]["value"] for at, found in measure["curves"]["loss"].items()} == {
        "1": 0.5,
        "2": None,
        "4": 0.5,
        "8": 0.25,
    }


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")]
    names = [run["name"] for run in data_of(report_page(runs, tmp_path / "report.html"))["runs"]]
    assert names == [str(run) for run in runs]


def test_evaluations_of_one_name_are_told_apart_too(tmp_path):
    folders = [write_evaluation(tmp_path / "a" / "eval"), write_evaluation(tmp_path / "b" / "eval")]
    names = [measure["name"] for measure in data_of(report_page(folders, tmp_path / "report.html"))["evaluations"]]
    assert names == [f"{folder}: heldout" for folder in folders]
    written = report_plots(folders, tmp_path / "plots")
    assert len(set(written)) == len(written) == 2


def test_configs_differ_in_what_was_asked_for_and_not_in_where_it_was_written(tmp_path):
    runs = []
    for name, lr in (("a", 0.1), ("b", 0.2)):
        run = write_run(tmp_path / name)
        config = {
            "output_dir": name,
            "device": "cab",
            "logs": f"{name}/logs",
            "places": [name],
            "optimizer": {"lr": lr},
        }
        (run / "config.yaml").write_text(json.dumps(config))
        runs.append(run)
    differences = data_of(report_page(runs, tmp_path / "report.html"))["differences"]
    assert differences == [["optimizer.lr", "0.1", "0.2"]]


def test_other_directories_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="is no run and no evaluation"):
        report_page([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="no rollouts/step_N.json"):
        rollouts_page(tmp_path)
    for text, message in (
        ('{"checkpoints": {}}', "no result of recipes/evaluate.py"),
        ('{"schema": 1, "checkpoints": {}}', "has schema 1, and 2 is read; evaluate again"),
        ('{"schema": 2, "checkpoints": {}}', "no result of recipes/evaluate.py"),
    ):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            report_page([tmp_path], tmp_path / "report.html")
    write_rollouts(tmp_path, 3)
    with pytest.raises(ValueError, match="of step 4; choose from 3"):
        rollouts_table(tmp_path, step=4)


def test_the_table_lists_the_samples_of_anchors_that_count_the_best_first(tmp_path):
    write_rollouts(tmp_path, 1)
    write_rollouts(tmp_path, 2)
    table = rollouts_table(tmp_path)
    assert table.title == "Rollouts of step 2, 3 of 3 anchors"
    places = [str(cell) for cell in table.columns[0].cells]
    assert places == ["2", "sample 2", "sample 1", "5", "sample 1", "sample 2", "11", "sample 1", "sample 2"]
    assert list(table.columns[2].cells)[1:3] == ["1.00", "0.00"]
    assert list(table.columns[6].cells)[-1] == "sample 1"
    assert rollouts_table(tmp_path, step=1, anchors=1).title == "Rollouts of step 1, 1 of 3 anchors"
