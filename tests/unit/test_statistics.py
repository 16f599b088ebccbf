"""pass@k, and the bootstrap that all metrics share: against closed forms, sacrebleu's own numbers, and known distributions."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from components.evaluation import Difference, Estimate, Scores, compare, pass_at_k


def scores(values, weights=None, groups=None):
    weights = [1.0] * len(values) if weights is None else weights
    sums = [[value * weight, weight] for value, weight in zip(values, weights, strict=True)]
    return Scores(groups=groups or [str(i) for i in range(len(values))], sums={"x": sums})


def estimated(found, *, resamples, seed=0):
    """Checkpoint -> estimate of the only metric, all compared with the first."""
    return compare(found, compare_with=[next(iter(found))], resamples=resamples, seed=seed)["x"]


def test_pass_at_k_by_hand():
    # Of 5 samples 2 are right. Two drawn are both wrong in 3 of 10 pairs.
    assert pass_at_k(5, 2, 1) == pytest.approx(2 / 5)
    assert pass_at_k(5, 2, 2) == pytest.approx(7 / 10)
    assert pass_at_k(5, 2, 4) == 1.0
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(1, 1, 1) == 1.0


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case):
    n, correct, k = case
    subsets = list(itertools.combinations(range(n), k))
    share = Fraction(sum(any(sample < correct for sample in subset) for subset in subsets), len(subsets))
    assert pass_at_k(n, correct, k) == pytest.approx(float(share), abs=1e-12)


def test_a_mean_is_over_weights_and_its_difference_over_pairs():
    found = {"base": scores([1.0, 3.0], [1.0, 3.0]), "other": scores([2.0, 2.0], [1.0, 3.0])}
    estimates = compare(found, compare_with=["base"], resamples=200, seed=1)["x"]
    assert estimates["base"].value == 2.5
    assert estimates["base"].differences == {}
    assert estimates["other"].differences["base"].value == -0.5
    # Both rows can be drawn twice: means of 1 and 3 against 2, and differences of +1 and -1.
    assert estimates["base"].interval == (1.0, 3.0)
    assert estimates["other"].interval == (2.0, 2.0)
    assert estimates["other"].differences["base"].interval == (-1.0, 1.0)


def test_every_checkpoint_is_compared_with_each_that_is_named_but_itself():
    found = {"base": scores([1.0, 2.0]), "sft": scores([2.0, 3.0]), "ebft": scores([2.5, 3.5])}
    estimates = compare(found, compare_with=["sft", "base"], resamples=20, seed=0)["x"]
    differences = {
        name: {other: each.value for other, each in estimate.differences.items()}
        for name, estimate in estimates.items()
    }
    assert differences == {"base": {"sft": -1.0}, "sft": {"base": 1.0}, "ebft": {"sft": 0.5, "base": 1.5}}
    assert estimates["ebft"].differences["sft"].interval == (0.5, 0.5)


def test_a_difference_that_is_the_same_in_every_row_has_no_width():
    values = np.random.default_rng(0).normal(size=50)
    found = {"base": scores(values), "other": scores(values + 0.25)}
    low, high = estimated(found, resamples=100)["other"].differences["base"].interval
    assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-12)


def test_an_interval_of_95_percent_holds_the_truth_about_95_times_in_100():
    """200 data sets of 80 exponential values, whose mean is 1. A count of 200 at 95% has a standard deviation of 3.1; the
    percentile bootstrap of so few, skewed values covers a little less."""
    rng = np.random.default_rng(0)
    covered = 0
    for number in range(200):
        low, high = estimated({"a": scores(rng.exponential(size=80))}, resamples=200, seed=number)["a"].interval
        covered += low <= 1 <= high
    assert 176 <= covered <= 198


def test_rows_of_one_group_are_drawn_together():
    """Ten copies of each value say no more than one of them: as wide as without them, and wider than if they were rows."""
    values = np.random.default_rng(1).normal(size=30)
    one = estimated({"a": scores(values)}, resamples=500, seed=3)["a"].interval
    grouped = scores(np.repeat(values, 10), groups=[str(i) for i in range(30) for _ in range(10)])
    ten = estimated({"a": grouped}, resamples=500, seed=3)["a"].interval
    apart = estimated({"a": scores(np.repeat(values, 10))}, resamples=500, seed=3)["a"].interval
    # Groups are drawn in the order of their names, "10" before "2": not the same draws, but the same distribution.
    assert ten[1] - ten[0] == pytest.approx(one[1] - one[0], rel=0.15)
    assert apart[1] - apart[0] < 0.5 * (ten[1] - ten[0])


def test_one_group_has_no_interval():
    found = {"a": scores([1.0, 2.0], groups=["m", "m"]), "b": scores([2.0, 2.0], groups=["m", "m"])}
    estimates = estimated(found, resamples=10)
    assert (estimates["a"].value, estimates["a"].interval) == (1.5, None)
    assert estimates["b"].differences["a"] == Difference(value=0.5, interval=None)


def test_what_one_group_alone_has_is_given_no_interval():
    """Drawing the one row that counts again and again would make its value look certain."""
    found = {"a": scores([1.0, 2.0, 3.0], [0.0, 1.0, 0.0]), "b": scores([1.0, 2.0, 4.0])}
    estimates = estimated(found, resamples=50)
    assert (estimates["a"].value, estimates["a"].interval, estimates["a"].groups) == (2.0, None, 1)
    assert estimates["b"].interval is not None
    assert estimates["b"].differences["a"].interval is None


def test_where_nothing_was_measured_there_is_no_value_and_no_difference(recwarn):
    found = {"a": scores([0.0, 0.0], [0.0, 0.0]), "b": scores([1.0, 3.0])}
    estimates = estimated(found, resamples=50)
    assert estimates["a"] == Estimate(value=None, interval=None, groups=0, differences={})
    assert estimates["b"].value == 2.0
    assert estimates["b"].differences == {"a": Difference(value=None, interval=None)}
    assert not recwarn.list


def test_rows_without_weight_count_for_nothing():
    with_empty = estimated({"a": scores([1.0, 9.0, 3.0], [1.0, 0.0, 1.0])}, resamples=50)["a"]
    assert with_empty.value == 2.0
    assert with_empty.interval == (1.0, 3.0)


HYPOTHESES = ["the cat sat on the mat", "a dog barks at night", "where is the station", "I do not know that man"]
REFERENCES = ["the cat is on the mat", "a dog was barking at night", "where is the train station", "I don't know him"]


@pytest.mark.parametrize(("name", "metric"), [("bleu", BLEU()), ("chrf", CHRF())])
def test_corpus_metrics_are_combined_as_sacrebleu_combines_them(name, metric):
    statistics = metric._extract_corpus_statistics(HYPOTHESES, [REFERENCES])
    sums = [[float(number) for number in row] for row in statistics]
    found = {"a": Scores(groups=["1", "2", "3", "4"], sums={"m": sums}, combine={"m": name})}
    estimate = compare(found, compare_with=["a"], resamples=200, seed=0)["m"]["a"]
    assert estimate.value == pytest.approx(metric.corpus_score(HYPOTHESES, [REFERENCES]).score, abs=1e-9)
    single = [metric.corpus_score([h], [[r]]).score for h, r in zip(HYPOTHESES, REFERENCES, strict=True)]
    assert min(single) <= estimate.interval[0] < estimate.value < estimate.interval[1] <= max(single)
