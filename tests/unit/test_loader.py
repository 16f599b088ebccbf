"""``components.data.loader``: order, shares and resuming."""

from itertools import chain, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import TrainStream, batch_loader, collate


class Numbered:
    """Rows of two tokens, both the row's number."""

    def __init__(self, size, fingerprint="numbers"):
        self.size = size
        self.fingerprint = fingerprint

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        tokens = torch.full((2,), index)
        return {"tokens": tokens, "doc_ids": torch.zeros_like(tokens), "target_mask": torch.ones(2, dtype=torch.bool)}


def loader(size=11, batch_size=2, **options):
    return batch_loader(Numbered(size), batch_size=batch_size, **{"seed": 0, "shuffle": True, **options})


def numbers(batch):
    """The rows of a batch that count."""
    return batch.tokens[batch.target_mask.any(dim=1), 0].tolist()


sizes = {"world_size": st.integers(1, 4), "batch_size": st.integers(1, 3), "size": st.integers(12, 30)}


@settings(max_examples=40)
@given(**sizes, seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_ranks_share_a_training_epoch_and_together_take_what_one_would(world_size, batch_size, size, seed, epoch):
    ranks = [loader(size, batch_size, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = loader(size, batch_size * world_size, seed=seed)
    for each in (*ranks, alone):
        each.sampler.set_epoch(epoch)
    shares = [[numbers(batch) for batch in each] for each in ranks]
    together = [sorted(chain(*batches)) for batches in zip(*shares, strict=True)]
    assert together == [sorted(numbers(batch)) for batch in alone]
    taken = list(chain(*together))
    assert len(set(taken)) == len(taken) == size // (batch_size * world_size) * (batch_size * world_size)


@settings(max_examples=40)
@given(**sizes)
def test_ranks_share_the_validation_rows_each_counted_once(world_size, batch_size, size):
    options = {"shuffle": False, "world_size": world_size}
    shares = [list(loader(size, batch_size, rank=rank, **options)) for rank in range(world_size)]
    assert sorted(number for batches in shares for batch in batches for number in numbers(batch)) == list(range(size))
    assert len({tuple(len(batch.tokens) for batch in batches) for batches in shares}) == 1  # equally many calls


def test_validation_rows_come_in_order_and_the_last_batch_is_shorter():
    validation = loader(5, 2, shuffle=False)
    for _ in range(2):
        assert [numbers(batch) for batch in validation] == [[0, 1], [2, 3], [4]]


def test_rows_added_for_equal_shares_are_padding():
    *_, last = loader(3, 1, shuffle=False, rank=1, world_size=2)
    assert last.doc_ids.tolist() == [[-1, -1]]
    assert not last.target_mask.any()


def test_epochs_and_seeds_have_their_own_orders():
    stream = TrainStream(loader(12))
    first, second = ([numbers(batch) for batch in islice(stream, 6)] for _ in range(2))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(12))
    assert first != second
    assert first != [numbers(batch) for batch in islice(TrainStream(loader(12, seed=5)), 6)]


def test_the_epoch_is_that_of_the_last_batch():
    stream = TrainStream(loader(6))
    epochs = []
    for _ in range(7):
        next(stream)
        epochs.append(stream.epoch)
    assert epochs == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("stop", range(12))  # 5 batches an epoch: in the middle, at both ends, and two epochs on
@pytest.mark.parametrize("rank", [0, 1])
def test_a_resumed_stream_goes_on_as_if_it_had_not_stopped(stop, rank):
    options = {"size": 21, "rank": rank, "world_size": 2}
    uninterrupted = [numbers(batch) for batch in islice(TrainStream(loader(**options)), 20)]
    stream = TrainStream(loader(**options))
    before = [numbers(batch) for batch in islice(stream, stop)]
    resumed = TrainStream(loader(**options))
    resumed.load_state_dict(stream.state_dict())
    assert resumed.state_dict() == stream.state_dict()
    after = [(numbers(batch), resumed.epoch) for batch in islice(resumed, 20 - stop)]
    assert before + [batch for batch, _ in after] == uninterrupted
    assert [epoch for _, epoch in after] == [i // 5 for i in range(stop, 20)]
    assert [numbers(batch) for batch in islice(stream, 20 - stop)] == [batch for batch, _ in after]


def test_a_stream_goes_on_with_another_number_of_ranks_that_take_as_many_rows():
    def taken(streams, count):
        return [sorted(chain(*(numbers(next(stream)) for stream in streams))) for _ in range(count)]

    whole = taken([TrainStream(loader(batch_size=4))], 6)
    streams = [TrainStream(loader(batch_size=4))]
    assert taken(streams, 3) == whole[:3]
    ranks = [TrainStream(loader(rank=rank, world_size=2)) for rank in range(2)]
    for stream in ranks:
        stream.load_state_dict(streams[0].state_dict())
    assert taken(ranks, 3) == whole[3:]


@pytest.mark.parametrize("stop", range(6))
def test_the_loader_alone_resumes_within_its_epoch(stop):
    whole, first, second = loader(), loader(), loader()
    for each in (whole, first, second):
        each.sampler.set_epoch(3)
    before = [numbers(batch) for batch in islice(first, stop)]
    second.load_state_dict(first.state_dict())
    assert before + [numbers(batch) for batch in second] == [numbers(batch) for batch in whole]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (batch_loader(Numbered(11, "letters"), batch_size=2, seed=0, shuffle=True), "fingerprint numbers, .* letters"),
        (loader(batch_size=3), "global_batch_size 2, this run has 3"),
        (loader(world_size=2), "global_batch_size 2, this run has 4"),
        (loader(seed=1), "seed 0, this run has 1"),
    ],
)
def test_a_stream_of_other_data_or_another_order_is_not_resumed(other, message):
    with pytest.raises(ValueError, match=message):
        TrainStream(other).load_state_dict(TrainStream(loader()).state_dict())


def test_drawing_batches_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(islice(TrainStream(loader()), 12))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [True, False])
def test_fewer_rows_than_one_batch_of_all_ranks_is_refused(shuffle):
    with pytest.raises(ValueError, match=r"has 5 rows, fewer than one batch of 6 \(3 on each of 2 processes\)"):
        loader(5, 3, world_size=2, shuffle=shuffle)


def test_groups_travel_with_their_rows():
    rows = [Numbered(3)[index] for index in range(3)]
    assert collate(rows).groups is None
    batch = collate([{**row, "group": name} for row, name in zip(rows, "aab", strict=True)])
    assert batch.to("cpu").groups == ["a", "a", "b"]
    part = batch.rows(slice(1, 3))
    assert (part.tokens.tolist(), part.groups, part.records) == ([[1, 1], [2, 2]], ["a", "b"], None)


def test_records_travel_with_their_rows():
    rows = [Numbered(2)[index] for index in range(2)]
    assert collate(rows).records is None
    batch = collate([{**row, "record": {"id": index}} for index, row in enumerate(rows)])
    assert batch.tokens.tolist() == [[0, 0], [1, 1]]
    assert batch.records == [{"id": 0}, {"id": 1}]
