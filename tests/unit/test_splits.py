"""``components.data.splits``: groups stay together, and stay where they are."""

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import split_by_group


def split(groups, **options):
    """Numbers of the records in each part, as far as it has any."""
    source = datasets.Dataset.from_dict({"number": list(range(len(groups))), "group": groups})
    parts = []
    for part in ("train", "validation"):
        try:
            parts.append(split_by_group(source, part=part, **options)["number"][:])
        except ValueError as error:
            assert "falls into" in str(error)  # noqa: PT017
            parts.append([])
    return parts


groups = st.lists(st.sampled_from([f"module{i}" for i in range(30)]), min_size=1, max_size=40)


@settings(max_examples=25)
@given(groups=groups, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 3))
def test_every_record_is_in_one_part_and_no_group_in_both(groups, fraction, seed):
    train, validation = split(groups, fraction=fraction, seed=seed)
    assert sorted(train + validation) == list(range(len(groups)))
    assert train == sorted(train)
    assert not {groups[i] for i in train} & {groups[i] for i in validation}


@settings(max_examples=25)
@given(groups=groups, more=groups)
def test_further_records_move_no_group(groups, more):
    before, after = (split(each, fraction=0.5)[1] for each in (groups, groups + more))
    assert before == [number for number in after if number < len(groups)]


def test_fraction_is_the_share_of_groups_held_out_and_seeds_draw_others():
    names = [f"group {i}" for i in range(2000)]
    held_out = [set(split(names, fraction=0.2, seed=seed)[1]) for seed in (0, 1)]
    for numbers in held_out:
        assert 340 < len(numbers) < 460  # 400, with a standard deviation of 18
    assert 40 < len(held_out[0] & held_out[1]) < 120  # 80 by chance


def test_a_larger_fraction_only_adds_groups():
    names = [f"group {i}" for i in range(200)]
    assert set(split(names, fraction=0.1)[1]) < set(split(names, fraction=0.3)[1])


def test_a_stream_is_split_like_a_dataset():
    source = datasets.Dataset.from_dict({"id": list(range(60)), "page": [i // 3 for i in range(60)]})
    for part in ("train", "validation"):
        options = {"part": part, "column": "page", "fraction": 0.4}
        streamed = split_by_group(source.to_iterable_dataset(), **options)
        assert [row["id"] for row in streamed] == split_by_group(source, **options)["id"][:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0}, "fraction is 1.0"),
        ({"part": "test"}, "part is 'test'; choose 'train' or 'validation'"),
        ({"column": "groups"}, "no column 'groups'; did you mean 'group'?"),
        ({"column": "none"}, "a record has no 'none' to split by"),
        ({"fraction": 1e-9}, "no group of column 'group' falls into 'validation'"),
    ],
)
def test_what_cannot_be_split_is_refused(options, message):
    source = datasets.Dataset.from_dict({"group": ["a", "b"], "none": ["a", None]})
    with pytest.raises(ValueError, match=message):
        split_by_group(source, **{"part": "validation", **options})
