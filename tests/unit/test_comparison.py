"""Tables and plots of an evaluation, from ``results.json`` written by hand."""

import math

import matplotlib.pyplot as plt

from components.evaluation import Scores, compare, load_summary, save_summary, summarise
from components.report import comparison, plot_comparison


def summary(tmp_path, *, groups=9, compare_with=("base",)):
    """Three checkpoints with losses 2, 3 and 5 in every row, and of ``ebft`` no second point of the curve."""

    def scores(value, second):
        sums = {"loss": [value, 1.0], "curve/1": [value, 1.0], "curve/2": second, "curve/4": [value, 1.0]}
        return Scores(
            groups=[f"g{row}" for row in range(groups)], sums={name: [s] * groups for name, s in sums.items()}
        )

    found = {"base": scores(2.0, [2.0, 1.0]), "sft": scores(3.0, [3.0, 1.0]), "ebft": scores(5.0, [0.0, 0.0])}
    estimates = compare(found, compare_with=compare_with, resamples=10, seed=0)
    measure = summarise(found["base"], estimates) | {"notes": {"loss": "signature"}}
    names = {"checkpoints": dict.fromkeys(found), "compare_with": list(compare_with)}
    save_summary(tmp_path, names | {"measures": {"heldout": measure}})
    return load_summary(tmp_path)


def cells(table):
    return list(zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True))


def test_the_table_has_values_and_differences_to_the_first_that_is_named(tmp_path):
    (table,) = comparison(summary(tmp_path, compare_with=["sft"]))
    assert [column.header for column in table.columns][2:] == ["value", "interval", "minus sft", "interval"]
    assert cells(table)[:3] == [
        ("loss", "base", "2.0000", "2.0000 to 2.0000", "-1.0000", "-1.0000 to -1.0000"),
        ("", "sft", "3.0000", "3.0000 to 3.0000", "", ""),
        ("", "ebft", "5.0000", "5.0000 to 5.0000", "+2.0000", "+2.0000 to +2.0000"),
    ]


def test_every_further_one_has_a_table_of_differences(tmp_path):
    first, second = comparison(summary(tmp_path, compare_with=["base", "sft"]))
    assert (first.title, second.title) == ("heldout: 9 rows, 9 groups", "heldout: 9 rows, 9 groups, minus sft")
    assert "signature" in first.caption
    assert cells(second)[:3] == [
        ("loss", "base", "-1.0000", "-1.0000 to -1.0000"),
        ("", "sft", "", ""),
        ("", "ebft", "+2.0000", "+2.0000 to +2.0000"),
    ]


def test_what_has_no_value_is_a_dash(tmp_path):
    read = summary(tmp_path)
    del read["measures"]["heldout"]["metrics"]["curve/4"]  # the last point is shown
    (table,) = comparison(read)
    assert cells(table)[-1] == ("", "ebft", "-", "-", "-", "-")


def test_few_groups_are_counted_and_named_as_too_narrow(tmp_path):
    for groups, narrow in ((29, True), (30, False)):
        measure = summary(tmp_path, groups=groups)["measures"]["heldout"]
        assert measure["groups"] == groups
        assert f"over {groups} groups" in measure["intervals"]
        assert ("too narrow for fewer than 30" in measure["intervals"]) == narrow
        (table,) = comparison(summary(tmp_path, groups=groups))
        assert measure["intervals"] in table.caption


def test_plots_have_values_then_differences_and_gaps_where_nothing_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    read = summary(tmp_path, compare_with=["base", "sft"])
    assert plot_comparison(read, tmp_path) == [tmp_path / "heldout.png"]
    figure = plt.gcf()
    values, to_base, to_sft = (
        {line.get_label(): list(line.get_ydata()) for line in axis.get_lines() if not line.get_label().startswith("_")}
        for axis in figure.axes
    )
    monkeypatch.undo()
    plt.close(figure)
    assert values["sft"] == [3.0, 3.0, 3.0]
    assert (values["ebft"][0], math.isnan(values["ebft"][1]), values["ebft"][2]) == (5.0, True, 5.0)
    assert to_base.keys() == {"sft", "ebft"}
    assert (to_sft["base"], to_sft["ebft"][0], math.isnan(to_sft["ebft"][1])) == ([-1.0] * 3, 2.0, True)
