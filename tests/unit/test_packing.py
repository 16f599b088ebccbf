"""``components.data.packing``: the rows are the corpus, cut."""

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

from components.data import PackedText, load_tokenizer

EOS = 1


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


def pack(tokenizer, texts, **options):
    return PackedText(tokenizer=tokenizer, source=datasets.Dataset.from_dict({"text": texts}), **options)


def test_a_document_cut_by_a_row_goes_on_in_the_next(tokenizer):
    a, b, c = tokenizer.encode("abc")
    rows = pack(tokenizer, ["aa", "b", "cccc"], seq_len=4)  # aa. b. | cccc.: the last EOS is left over
    assert len(rows) == 2
    assert rows[0]["tokens"].tolist() == [a, a, EOS, b]
    assert rows[0]["doc_ids"].tolist() == [0, 0, 0, 1]
    assert rows[1]["tokens"].tolist() == [EOS, c, c, c]
    assert rows[1]["doc_ids"].tolist() == [0, 1, 1, 1]
    assert rows[1]["target_mask"].tolist() == [True] * 4


def test_only_a_corpus_shorter_than_a_row_is_padded(tokenizer):
    a, b = tokenizer.encode("ab")
    [row] = pack(tokenizer, ["a", "b"], seq_len=6)
    assert row["tokens"].tolist() == [a, EOS, b, EOS, tokenizer.pad_id, tokenizer.pad_id]
    assert row["doc_ids"].tolist() == [0, 0, 1, 1, -1, -1]
    assert row["target_mask"].tolist() == [True] * 4 + [False] * 2


documents = st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=8)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=documents, seq_len=st.integers(2, 12), add_bos=st.booleans(), add_eos=st.booleans())
def test_rows_laid_end_to_end_are_the_documents(tokenizer, texts, seq_len, add_bos, add_eos):
    rows = list(pack(tokenizer, texts, seq_len=seq_len, add_bos=add_bos, add_eos=add_eos))
    encoded = [tokenizer.encode(text, add_bos=add_bos, add_eos=add_eos) for text in texts]
    corpus = [(token, number) for number, document in enumerate(encoded) for token in document]
    corpus = corpus[: max(1, len(corpus) // seq_len) * seq_len]
    for start, row in zip(range(0, len(corpus), seq_len), rows, strict=True):
        expected = corpus[start : start + seq_len]
        padding = seq_len - len(expected)
        assert row["tokens"].tolist() == [token for token, _ in expected] + [tokenizer.pad_id] * padding
        assert row["doc_ids"].tolist() == [number - expected[0][1] for _, number in expected] + [-1] * padding
        assert torch.equal(row["target_mask"], row["doc_ids"] >= 0)
        assert {key: row[key].dtype for key in row if key != "group"} == {
            "tokens": torch.long,
            "doc_ids": torch.long,
            "target_mask": torch.bool,
        }


def test_documents_that_flow_into_one_another_are_one(tokenizer):
    assert pack(tokenizer, ["a", "b", "c"], seq_len=4, isolate_documents=False)[0]["doc_ids"].tolist() == [0] * 4
    short = pack(tokenizer, ["a", "b"], seq_len=5, isolate_documents=False)
    assert short[0]["doc_ids"].tolist() == [0] * 4 + [-1]


class LengthTokenizer:
    """A text becomes its length."""

    pad_id = 0

    def __init__(self):
        self.read = 0

    def encode(self, text, add_bos=False, add_eos=False):
        self.read += 1
        return [len(text)]


@pytest.mark.parametrize(
    ("max_rows", "kept"), [(1, [0]), (2, [0, 2]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])]
)
def test_max_rows_are_spread_evenly_over_all_documents(max_rows, kept):
    texts = ["a" * i for i in range(17)]  # five rows of 3, and 2 tokens left over
    rows = pack(LengthTokenizer(), texts, seq_len=3, max_rows=max_rows)
    assert [row["tokens"].tolist() for row in rows] == [[3 * row, 3 * row + 1, 3 * row + 2] for row in kept]
    assert [row["group"] for row in rows] == [f"document {3 * row}" for row in kept]


def test_max_rows_of_a_stream_are_the_first_and_it_is_read_no_further():
    source = datasets.Dataset.from_dict({"text": ["a" * (i % 7) for i in range(1000)]}).to_iterable_dataset()
    tokenizer = LengthTokenizer()
    rows = PackedText(tokenizer=tokenizer, source=source, seq_len=3, max_rows=2)
    assert [row["tokens"].tolist() for row in rows] == [[0, 1, 2], [3, 4, 5]]
    assert [row["group"] for row in rows] == ["document 0", "document 3"]
    assert tokenizer.read < 1000


@pytest.mark.parametrize("isolate_documents", [True, False])
def test_a_row_is_of_the_group_that_most_of_its_tokens_are_of(tokenizer, isolate_documents):
    texts, groups = ["a", "bb", "", "cccc", "d"], ["x.py", "y.py", "z.py", 7, None]
    source = datasets.Dataset.from_dict({"text": texts, "group": [None if g is None else str(g) for g in groups]})
    options = {"seq_len": 4, "add_eos": False, "isolate_documents": isolate_documents}
    rows = PackedText(tokenizer=tokenizer, source=source, **options)  # abbc | cccd
    assert [row["group"] for row in rows] == ["y.py", "7"]
    rows = PackedText(
        tokenizer=tokenizer, source=source, **{**options, "seq_len": 2}
    )  # ab | bc | cc | cd: first of equals
    assert [row["group"] for row in rows] == ["x.py", "y.py", "7", "7"]
    [row] = PackedText(tokenizer=tokenizer, source=source, **{**options, "seq_len": 9})  # a padded row
    assert row["group"] == "7"
    ungrouped = pack(tokenizer, texts, seq_len=2, add_eos=False)
    assert [row["group"] for row in ungrouped] == ["document 0", "document 1", "document 2", "document 2"]
    last = source.select([4])
    assert PackedText(tokenizer=tokenizer, source=last, **{**options, "seq_len": 2})[0]["group"] == "document 0"


def test_groups_leave_the_fingerprint_as_it_is(tokenizer):
    source = datasets.Dataset.from_dict({"text": ["abc", "de"], "group": ["m", "m"]})
    assert PackedText(tokenizer=tokenizer, source=source, seq_len=2).fingerprint == (
        pack(tokenizer, ["abc", "de"], seq_len=2).fingerprint
    )


def test_a_torchtune_tokenizer_gives_the_same_rows(tokenizer, tokenizer_dir):
    class TorchtuneTokenizer(HuggingFaceBaseTokenizer):
        pad_id = EOS

    files = [str(tokenizer_dir / name) for name in ("tokenizer.json", "tokenizer_config.json")]
    other = TorchtuneTokenizer(files[0], tokenizer_config_json_path=files[1])
    ours, theirs = (pack(each, ["ab", "c", "abc"], seq_len=4, add_bos=True) for each in (tokenizer, other))
    assert ours.fingerprint == theirs.fingerprint


def test_the_fingerprint_is_that_of_the_rows(tokenizer):
    texts = ["abc", "de", "fgh"]
    base = pack(tokenizer, texts, seq_len=4).fingerprint
    assert len(base) == 64
    assert base == pack(tokenizer, texts, seq_len=4).fingerprint
    others = [
        pack(tokenizer, ["abc", "df", "fgh"], seq_len=4),  # a token
        pack(tokenizer, texts, seq_len=2),  # the length of rows
        pack(tokenizer, texts, seq_len=4, isolate_documents=False),  # documents
        pack(tokenizer, texts, seq_len=4, max_rows=1),  # the number of rows
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["abc"], {"seq_len": 1}, "seq_len is 1"),
        (["abc"], {"seq_len": 4, "max_rows": 0}, "max_rows is 0"),
        ([""], {"seq_len": 4, "add_eos": False}, "hold no tokens"),
    ],
)
def test_what_gives_no_rows_is_refused(tokenizer, texts, options, message):
    with pytest.raises(ValueError, match=message):
        pack(tokenizer, texts, **options)
