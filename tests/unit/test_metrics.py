"""Numbers of a run: weighted means, parts that add up, a log that survives a crash, schedules."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from components.evaluation import Measured, forget_validations, load_validations, merge, save_validation
from components.report import before_after, plot_run
from components.training import MetricsLog, StepMetrics, read_metrics, start, stop, warmup_then


@pytest.fixture
def _group():
    start("cpu")
    yield
    stop()


@pytest.mark.usefixtures("_group")
def test_a_mean_over_micro_batches_is_weighted_by_what_they_hold():
    """Means 1 over 3 blocks and 5 over 1: (3 + 5) / 4 = 2. An empty micro-batch adds nothing, even if it says nan."""
    metrics = StepMetrics()
    metrics.add({"reward": 1.0}, weight=3)
    metrics.add({"reward": 5.0}, weight=1)
    metrics.add({"reward": math.nan}, weight=0)
    metrics.add_parts({"loss": 0.25})
    metrics.add_parts({"loss": 0.5})
    with metrics.phase("rollouts"):
        pass
    mean = metrics.mean()
    assert mean["reward"] == 2
    assert mean["loss"] == 0.75
    assert 0 <= mean["seconds/rollouts"] <= mean["seconds/step"]


@pytest.mark.usefixtures("_group")
def test_nothing_at_all_has_a_mean_of_zero():
    metrics = StepMetrics()
    metrics.add({"reward": math.nan}, weight=0)
    assert metrics.mean()["reward"] == 0


def test_the_log_is_cut_back_to_the_step_a_run_resumes_from(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 5):
        log.append(step, {"loss": step / 2, "gap": math.inf})
    with log.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert read_metrics(tmp_path)[0] == {"step": 1, "loss": 0.5, "gap": None}
    log.truncate(2)
    log.append(3, {"loss": 0.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_paired_change_by_hand():
    """Rows (1, 3) and then (2, 6), weights equal: changes 1 and 3, mean 2, standard error sqrt(((1-2)^2 + (3-2)^2) / 2) /
    sqrt(2) = 1 / sqrt(2) * sqrt(2) = 1."""
    before, after = Measured([1.0, 3.0], [1, 1]), Measured([2.0, 6.0], [1, 1])
    change = after.change_since(before)
    assert change.mean() == 2
    assert change.standard_error() == pytest.approx(1)
    assert change.margin() == pytest.approx(1.959964)
    assert Measured([1.0], [1]).standard_error() == math.inf


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=20))
def test_equal_weights_give_the_ordinary_standard_error(rows):
    values = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    measured = Measured(values.tolist(), [3] * len(rows))
    assert measured.mean() == pytest.approx(float(values.mean()), abs=1e-9)
    assert measured.standard_error() == pytest.approx(float(values.std() / len(rows) ** 0.5), abs=1e-9)
    weighted = Measured(values.tolist(), [weight for _, weight in rows])
    weights = torch.tensor([weight for _, weight in rows], dtype=torch.float64)
    assert weighted.mean() == pytest.approx(float((values * weights).sum() / weights.sum()), abs=1e-9)


def test_rows_of_one_group_count_as_one():
    """Two files of two rows each: mean 3, residuals summed within files -2 and 2, so sqrt((4 + 4) * 2 / 1) / 4 = 1."""
    measured = Measured([1.0, 3.0, 4.0, 4.0], [1, 1, 1, 1], ["a", "a", "b", "b"])
    assert measured.mean() == 3
    assert measured.standard_error() == pytest.approx(1)
    assert Measured([1.0, 3.0], [1, 1], ["a", "a"]).standard_error() == math.inf


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 9)), min_size=2, max_size=12), st.integers(2, 5))
def test_copies_of_rows_in_their_groups_leave_the_standard_error_as_it_is(rows, copies):
    values, weights = (list(column) for column in zip(*rows, strict=True))
    names = [f"file {number}" for number in range(len(rows))]
    alone = Measured(values, weights).standard_error()
    assert Measured(values, weights, names).standard_error() == pytest.approx(alone)
    repeated = Measured(values * copies, weights * copies, names * copies)
    assert repeated.standard_error() == pytest.approx(alone, abs=1e-12)


def test_validations_of_different_rows_are_not_compared():
    with pytest.raises(ValueError, match="of different rows"):
        Measured([1.0, 2.0], [1, 1]).change_since(Measured([1.0], [1]))
    with pytest.raises(ValueError, match="of different rows"):
        Measured([1.0, 2.0], [1, 1], ["a", "b"]).change_since(Measured([1.0, 2.0], [1, 1], ["a", "c"]))


def test_a_change_is_of_the_groups_that_either_validation_knows(tmp_path):
    folder = tmp_path / "validation"
    folder.mkdir()
    (folder / "step_000000.json").write_text('{"cross_entropy": {"values": [1.0, 2.0], "weights": [3, 4]}}')
    old = load_validations(tmp_path)[0]["cross_entropy"]
    assert old == Measured([1.0, 2.0], [3, 4], None)
    grouped = Measured([2.0, 2.0], [3, 4], ["a", "b"])
    for change in (grouped.change_since(old), grouped.change_since(grouped)):
        assert change.groups == ["a", "b"]
    assert old.change_since(old).groups is None
    save_validation(tmp_path, 5, {"cross_entropy": grouped})
    assert load_validations(tmp_path)[5]["cross_entropy"] == grouped


def test_validations_are_kept_by_step_and_forgotten_after_one(tmp_path):
    for step in (0, 10, 20):
        save_validation(tmp_path, step, {"cross_entropy": Measured([1.0, 2.0 + step], [3, 4])})
    assert list(load_validations(tmp_path)) == [0, 10, 20]
    assert load_validations(tmp_path)[10]["cross_entropy"] == Measured([1.0, 12.0], [3, 4])
    forget_validations(tmp_path, after=10)
    assert list(load_validations(tmp_path)) == [0, 10]


def test_ranks_are_merged_in_the_order_of_the_rows():
    """Three rows dealt to two ranks; the second row had nothing to measure for "a", and the fourth is padding."""
    parts = [
        {"a": Measured([1.0, 3.0], [2, 2]), "b": Measured([5.0, 7.0], [1, 1])},
        {"a": Measured([0.0, 0.0], [0, 0]), "b": Measured([6.0, 0.0], [1, 0]), "c": Measured([0.0, 0.0], [0, 0])},
    ]
    assert merge(parts) == {"a": Measured([1.0, 3.0], [2, 2]), "b": Measured([5.0, 6.0, 7.0], [1, 1, 1])}
    for part in parts:
        for entry in part.values():
            entry.groups = [f"{value}" for value in entry.values]
    assert merge(parts)["b"] == Measured([5.0, 6.0, 7.0], [1, 1, 1], ["5.0", "6.0", "7.0"])


def test_the_table_compares_the_first_with_the_last(tmp_path):
    for step, shift in ((0, 0.0), (5, 9.0), (10, -1.0)):
        values = [2.0 + shift, 4.0 + 2 * shift]
        save_validation(tmp_path, step, {"cross_entropy": Measured(values, [1, 1])})
    table = before_after(tmp_path)
    assert table.title == "Validation, 2 rows of held-out text"
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[1:] == ["3.0000", "1.5000", "-1.5000 ± 0.5000", "-3.0"]
    for step in (0, 10):
        save_validation(tmp_path, step, {"cross_entropy": Measured([2.0, 4.0, 3.0], [1, 1, 1], ["a", "b", "b"])})
    assert before_after(tmp_path).title == "Validation, 3 rows of held-out text, 2 groups"
    with pytest.raises(ValueError, match="holds 0 validations"):
        before_after(tmp_path / "other")


def test_plots_need_nothing_but_the_run(tmp_path):
    assert plot_run(tmp_path) == []
    MetricsLog(tmp_path).append(1, {"reward": 1.0, "grad_norm": math.nan})
    save_validation(tmp_path, 0, {"cross_entropy": Measured([1.0, 2.0], [1, 1])})
    assert [path.name for path in plot_run(tmp_path)] == ["training.png", "validation.png"]


def rates(steps=20, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = warmup_then(optimizer, max_steps=steps, **options)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return out


@given(
    decay=st.sampled_from(["constant", "cosine", "linear"]),
    warmup=st.floats(0, 0.9),
    final=st.floats(0, 1),
    steps=st.integers(1, 30),
)
def test_rates_rise_to_the_peak_and_never_after_it(decay, warmup, final, steps):
    got = rates(steps, decay=decay, warmup=warmup, final=final)
    peak = math.ceil(warmup * steps)
    assert got[:peak] == sorted(got[:peak])
    assert got[peak:] == sorted(got[peak:], reverse=True)
    assert all(0 < rate <= 1 for rate in got[: peak + 1])
    assert min(got[peak:], default=1) >= (1 if decay == "constant" else final) - 1e-9


@pytest.mark.parametrize("options", [{"warmup": 1.0}, {"warmup": -0.1}, {"final": 2.0}, {"decay": "step"}])
def test_schedules_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="warmup|decay"):
        rates(**options)


def test_a_process_alone_is_a_group_of_one():
    assert start("cpu") == torch.device("cpu")
    assert dist.get_world_size() == 1
    stop()
    with pytest.raises(ValueError, match="device is 'tpu'"):
        start("tpu")
