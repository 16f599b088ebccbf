"""``components.data.streaming``: the rows of ``PackedText``, in windows, from any position on."""

import json
from itertools import islice

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.data import (
    PackedText,
    StreamedText,
    TrainStream,
    batch_loader,
    first_rows,
    load_text,
    load_tokenizer,
    split_by_group,
    stream_text,
    streaming,
    train_stream,
)


@pytest.fixture(autouse=True)
def read_little_at_once(monkeypatch):
    """So that windows begin within, at and between what is read together."""
    monkeypatch.setattr(streaming, "_CHARACTERS_AT_ONCE", 20)
    monkeypatch.setattr(streaming, "_ROWS_HASHED", 5)


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def stream_of(texts, shards=1):
    return datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset(num_shards=min(shards, len(texts)))


def as_lists(row):
    return tuple(tuple(row[key].tolist()) for key in ("tokens", "doc_ids", "target_mask"))


def batches(stream, count):
    return [list(zip(b.tokens.tolist(), b.doc_ids.tolist(), strict=True)) for b in islice(stream, count)]


documents = st.lists(st.text("abc", max_size=9), min_size=1, max_size=20)
LAW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(
    texts=documents,
    seq_len=st.integers(2, 8),
    shuffle_rows=st.integers(1, 5),
    add_bos=st.booleans(),
    isolate_documents=st.booleans(),
    shards=st.integers(1, 3),
)
def test_an_epoch_in_order_is_the_rows_of_packed_text(tokenizer, texts, seq_len, shuffle_rows, shards, **options):
    texts = [*texts, "abcabcab"]
    options = {"tokenizer": tokenizer, "seq_len": seq_len, **options}
    packed = PackedText(source=datasets.Dataset.from_dict({"text": texts}), **options)
    streamed = StreamedText(source=stream_of(texts, shards), shuffle_rows=shuffle_rows, **options)
    assert [as_lists(row) for row in streamed] == [as_lists(row) for row in packed]
    assert [as_lists(row) for row in first_rows(streamed, 3)] == [as_lists(row) for row in first_rows(packed, 3)]


TEXTS = ["abcdefgh"[: 1 + i % 7] * (1 + i % 3) + str(i) for i in range(29)]


def streamed(tokenizer, texts=TEXTS, **options):
    return StreamedText(tokenizer=tokenizer, source=stream_of(texts, 2), **{"seq_len": 8, "shuffle_rows": 4, **options})


def test_windows_are_shuffled_each_in_its_own_order_and_each_epoch_again(tokenizer):
    texts = [f"{number:07}" for number in range(22)]  # a row each, with its EOS: five windows of 4 rows, and one of 2

    def numbers(seed):
        stream = train_stream(streamed(tokenizer, texts), batch_size=1, seed=seed)
        return [[int(tokenizer.decode(batch.tokens[0].tolist())) for batch in islice(stream, 22)] for _ in range(2)]

    for epoch in numbers(seed=0):
        windows = [epoch[start : start + 4] for start in range(0, 22, 4)]
        assert [sorted(window) for window in windows] == [
            list(range(22))[start : start + 4] for start in range(0, 22, 4)
        ]
        assert len({tuple(number % 4 for number in window) for window in windows}) > 2
    assert numbers(seed=0)[0] != numbers(seed=0)[1]
    assert numbers(seed=0)[0] != numbers(seed=1)[0]


def test_a_window_of_one_row_leaves_the_order_of_the_corpus(tokenizer):
    stream = train_stream(streamed(tokenizer, shuffle_rows=1), batch_size=1, seed=0)
    rows = [as_lists(row)[0] for row in streamed(tokenizer)]
    assert [tuple(batch.tokens[0].tolist()) for batch in islice(stream, len(rows))] == rows


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stream_stopped_anywhere_goes_on_as_if_it_had_not(tokenizer, rank):
    def fresh():
        return train_stream(streamed(tokenizer), batch_size=3, seed=5, rank=rank, world_size=2)

    whole = batches(fresh(), 16)  # 6 rows a step of some 30 an epoch: three epochs
    stream = fresh()
    for stop in range(16):
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = fresh()
        resumed.load_state_dict(state)
        assert resumed.epoch == stream.epoch
        assert resumed.state_dict() == state
        assert batches(resumed, 16 - stop) == whole[stop:]
        next(stream)
    assert stream.epoch >= 2


@settings(LAW, max_examples=8)
@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 3), seed=st.integers(0, 3))
def test_ranks_take_in_turn_what_one_would(tokenizer, world_size, batch_size, seed):
    ranks = [
        train_stream(streamed(tokenizer), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    alone = train_stream(streamed(tokenizer), batch_size=batch_size * world_size, seed=seed)
    shares = [batches(each, 6) for each in ranks]
    for step, expected in enumerate(batches(alone, 6)):
        dealt = [shares[number % world_size][step][number // world_size] for number in range(batch_size * world_size)]
        assert dealt == expected
    assert len({json.dumps(each.state_dict()) for each in [*ranks, alone]}) == 1


def test_files_are_read_lazily_and_resumed(tokenizer, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(4):
        rows = [{"code": text, "group": text[-1]} for text in TEXTS[number * 7 :][:7]]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = stream_text(str(folder), column="code")
    options = {"tokenizer": tokenizer, "seq_len": 8}
    packed = PackedText(source=load_text(str(folder), column="code"), **options)
    assert [as_lists(row) for row in StreamedText(source=source, **options)] == [as_lists(row) for row in packed]

    fresh = lambda: train_stream(StreamedText(source=source, shuffle_rows=3, **options), batch_size=2, seed=0)  # noqa: E731
    whole, stream = batches(fresh(), 12), fresh()
    for stop in range(12):
        resumed = fresh()
        resumed.load_state_dict(stream.state_dict())
        assert batches(resumed, 12 - stop) == whole[stop:]
        next(stream)


def test_validation_reads_the_beginning_of_a_stream(tokenizer):
    read = []

    def texts():
        for text in TEXTS * 1000:
            read.append(text)
            yield {"text": text}

    source = datasets.IterableDataset.from_generator(texts)
    rows = PackedText(tokenizer=tokenizer, source=source, seq_len=8, max_rows=5)
    assert [as_lists(row) for row in rows] == [as_lists(row) for row in islice(streamed(tokenizer), 5)]
    assert len(read) < 1000
    with pytest.raises(ValueError, match="use PackedText with max_rows on the same source"):
        batch_loader(streamed(tokenizer), batch_size=1, seed=0, shuffle=False)


def test_a_split_stream_gives_only_its_part(tokenizer):
    source = datasets.Dataset.from_dict({"text": TEXTS, "group": [i // 3 for i in range(29)]})
    options = {"part": "train", "fraction": 0.4}
    here = split_by_group(source, **options)
    there = StreamedText(tokenizer=tokenizer, source=split_by_group(source.to_iterable_dataset(), **options), seq_len=8)
    packed = PackedText(tokenizer=tokenizer, source=here, seq_len=8)
    assert [as_lists(row) for row in there] == [as_lists(row) for row in packed]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ["x", *TEXTS[1:]]}, "has fingerprint"),
        ({"seq_len": 9}, "has fingerprint"),
        ({"shuffle_rows": 3}, "has fingerprint"),
        ({"isolate_documents": False}, "has fingerprint"),
        ({"seed": 1}, "has seed 0, this run has 1"),
        ({"batch_size": 3}, "has global_batch_size 2, this run has 3"),
        (
            {"texts": [*TEXTS[:-6], *reversed(TEXTS[-6:])]},
            "the corpus has changed where the data stream to resume stands",
        ),
    ],
)
def test_a_stream_of_other_data_or_another_order_is_not_resumed(tokenizer, change, message):
    def stream(batch_size=2, seed=0, **options):
        return train_stream(streamed(tokenizer, **options), batch_size=batch_size, seed=seed)

    stopped = stream()
    while stopped.epoch == 0:  # in the last window of the epoch, whose text is another, or in the first of the next
        before = stopped.state_dict()
        next(stopped)
    with pytest.raises(ValueError, match=message):
        stream(**change).load_state_dict(before)


def test_the_hash_of_what_was_read_is_another_after_every_window(tokenizer):
    stream = train_stream(streamed(tokenizer, shuffle_rows=1), batch_size=1, seed=0)
    seen = {next(stream) and stream.state_dict()["read"] for _ in range(80)}
    assert stream.epoch >= 1
    assert len(seen) == 80


def test_rows_in_memory_are_streamed_as_before_and_know_their_number(tokenizer):
    rows = PackedText(tokenizer=tokenizer, source=datasets.Dataset.from_dict({"text": TEXTS}), seq_len=8)
    stream = train_stream(rows, batch_size=2, seed=3)
    twin = TrainStream(batch_loader(rows, batch_size=2, seed=3, shuffle=True))
    assert stream.batches_per_epoch == len(rows) // 2
    assert batches(stream, 20) == batches(twin, 20)
    with pytest.raises(ValueError, match="give max_steps instead of epochs"):
        _ = train_stream(streamed(tokenizer), batch_size=1, seed=0).batches_per_epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"shuffle_rows": 0}, "shuffle_rows is 0"),
        ({"seq_len": 4096}, "less text than one row of 4096 tokens"),
    ],
)
def test_what_gives_no_rows_is_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        train_stream(streamed(tokenizer, **options), batch_size=1, seed=0)


def test_what_is_in_memory_is_no_stream(tokenizer):
    with pytest.raises(ValueError, match="source is no stream; use components.data.stream_text, or PackedText"):
        StreamedText(tokenizer=tokenizer, source=datasets.Dataset.from_dict({"text": TEXTS}), seq_len=8)
