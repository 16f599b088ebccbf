"""``components.data.prompts``: rows are prompts with their completions, and only completions are learned from."""

import json
import logging

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

from components.blocks import CompletionAnchor
from components.data import ChatTemplate, HFTokenizer, PromptCompletion, collate, load_tokenizer

BOS, EOS = 0, 1
CHAT = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def chatty(tokenizer_dir):
    plain = load_tokenizer(tokenizer_dir)
    template = ChatTemplate(CHAT, variables={}, special_tokens=["<bos>", "<eos>"])
    return HFTokenizer(plain._tokenizer, bos_id=BOS, eos_id=EOS, chat_template=template)


def rows(tokenizer, records, **options):
    source = datasets.Dataset.from_list(records)
    return PromptCompletion(tokenizer=tokenizer, source=source, **{"seq_len": 8, **options})


def pairs(*texts):
    """Records from ``"prompt|completion"``."""
    return [dict(zip(("prompt", "completion"), text.split("|"), strict=True)) for text in texts]


def test_a_row_is_prompt_completion_eos_and_padding(tokenizer):
    a, b, c = tokenizer.encode("abc")
    [row] = rows(tokenizer, pairs("ab|c"), seq_len=6)
    assert row["tokens"].tolist() == [a, b, c, EOS, EOS, EOS]
    assert row["doc_ids"].tolist() == [0, 0, 0, 0, -1, -1]
    assert row["target_mask"].tolist() == [False, False, True, True, False, False]
    assert row["record"] == {"prompt": "ab", "completion": "c"}


def test_bos_and_eos_are_options(tokenizer):
    a, b = tokenizer.encode("ab")
    [row] = rows(tokenizer, pairs("a|b"), seq_len=4, add_bos=True, add_eos=False)
    assert row["tokens"].tolist() == [BOS, a, b, EOS]
    assert row["doc_ids"].tolist() == [0, 0, 0, -1]
    assert row["target_mask"].tolist() == [False, False, True, False]


texts = st.text("abc é", max_size=9)
records = st.lists(st.tuples(texts, texts), min_size=1, max_size=12)
LAW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(records=records, seq_len=st.integers(2, 16), add_eos=st.booleans(), truncate=st.booleans())
def test_every_record_is_a_row_unless_it_is_too_long_or_has_nothing_to_learn(
    tokenizer, records, seq_len, add_eos, truncate
):
    expected = []
    for prompt, completion in records:
        prompt_ids, reply = tokenizer.encode(prompt), tokenizer.encode(completion, add_eos=add_eos)
        tokens = (prompt_ids + reply)[:seq_len]
        learned = tokens[len(prompt_ids) :]
        if learned and (truncate or len(prompt_ids + reply) <= seq_len):
            expected.append((prompt, completion, tokens, len(learned)))
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in records]
    options = {"seq_len": seq_len, "add_eos": add_eos, "too_long": "truncate" if truncate else "drop"}
    if not expected:
        with pytest.raises(ValueError, match=f"of {len(records)} records of dataset.source none is left"):
            rows(tokenizer, records, **options)
        return
    for row, (prompt, completion, tokens, learned) in zip(rows(tokenizer, records, **options), expected, strict=True):
        padding = seq_len - len(tokens)
        assert row["record"] == {"prompt": prompt, "completion": completion}
        assert row["tokens"].tolist() == tokens + [tokenizer.pad_id] * padding
        assert row["doc_ids"].tolist() == [0] * len(tokens) + [-1] * padding
        assert row["target_mask"].tolist() == [False] * (len(tokens) - learned) + [True] * learned + [False] * padding
        assert (row["tokens"].dtype, row["doc_ids"].dtype, row["target_mask"].dtype) == (
            torch.long,
            torch.long,
            torch.bool,
        )


@LAW
@given(records=records, seq_len=st.integers(2, 16), max_rows=st.integers(1, 4) | st.none())
def test_packed_rows_hold_the_same_records_one_document_each_in_order(tokenizer, records, seq_len, max_rows):
    records = [{"prompt": prompt, "completion": completion} for prompt, completion in [("", "a"), *records]]
    apart = list(rows(tokenizer, records, seq_len=seq_len, too_long="truncate"))
    packed = list(rows(tokenizer, records, seq_len=seq_len, too_long="truncate", packed=True, max_rows=max_rows))
    expected = [[]]
    for row in apart:
        document = [tuple(pair) for pair in zip(row["tokens"].tolist(), row["target_mask"].tolist(), strict=True)]
        document = document[: int((row["doc_ids"] == 0).sum())]
        if sum(map(len, expected[-1])) + len(document) > seq_len:
            expected.append([])
        expected[-1].append(document)
    for row, documents in zip(packed, expected[:max_rows], strict=True):
        assert "record" not in row
        length = sum(map(len, documents))
        flat = [(*pair, number) for number, document in enumerate(documents) for pair in document]
        flat += [(tokenizer.pad_id, False, -1)] * (seq_len - length)
        assert list(zip(*(row[key].tolist() for key in ("tokens", "target_mask", "doc_ids")), strict=True)) == flat


def test_a_stream_of_records_is_refused(tokenizer):
    source = datasets.Dataset.from_list(pairs("a|b")).to_iterable_dataset()
    with pytest.raises(
        ValueError, match="source is a stream, and PromptCompletion reads no streams; use .*load_records"
    ):
        PromptCompletion(tokenizer=tokenizer, source=source, seq_len=8)


def test_rows_are_of_their_records_groups(tokenizer, chatty):
    records = [record | {"group": group} for record, group in zip(pairs("a|b", "a|bc", "b|a"), "mmn", strict=True)]
    assert [row["group"] for row in rows(tokenizer, records)] == ["m", "m", "n"]
    assert [row["group"] for row in rows(chatty, records, seq_len=20, chat=True)] == ["m", "m", "n"]
    numbered = [records[0] | {"group": 7}, records[1] | {"group": None}]
    assert [row["group"] for row in rows(tokenizer, numbered)] == ["7", "record 1"]
    assert "group" not in rows(tokenizer, pairs("a|b"))[0]


def test_a_packed_row_is_of_the_longest_records_group_the_first_of_equals(tokenizer):
    records = [
        record | {"group": group} for record, group in zip(pairs("a|b", "a|bc", "b|ac", "b|"), "mnop", strict=True)
    ]  # with EOS 3, 4, 4 and 2 tokens
    assert [row["group"] for row in rows(tokenizer, records, seq_len=13, packed=True)] == ["n"]
    assert [row["group"] for row in rows(tokenizer, records, seq_len=7, packed=True)] == ["n", "o"]


@pytest.mark.parametrize("template", [None, "Q: {prompt}\nA:"])
@pytest.mark.parametrize("chat", [False, True])
def test_a_row_begins_with_what_a_completion_is_generated_from(chatty, template, chat):
    records = pairs("ab|c", "a|bca", "bcab|")
    made = rows(chatty, records, seq_len=40, template=template, chat=chat)
    batch = collate([made[i] for i in range(3)])
    anchors = CompletionAnchor()(batch, 4)
    for row, record in enumerate(records):
        prompt = (template or "{prompt}").format(**record)
        if chat:
            prompt = chatty.chat_template.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        assert batch.tokens[row, : anchors.positions[row, 0]].tolist() == chatty.encode(prompt)
        assert chatty.decode(batch.tokens[row][batch.target_mask[row]].tolist()) == record["completion"]
        assert batch.tokens[row][batch.target_mask[row]][-1] == EOS
    assert batch.records == records


def test_a_template_names_columns_and_doubles_braces(tokenizer):
    records = [{"source": "ja", "language": "German", "number": 3, "answer": "yes"}]
    [row] = rows(
        tokenizer, records, seq_len=40, template="{{{language} {number}}} {source}=", completion_column="answer"
    )
    learned = row["target_mask"]
    assert tokenizer.decode(row["tokens"][~learned & (row["doc_ids"] == 0)].tolist()) == "{German 3} ja="
    assert tokenizer.decode(row["tokens"][learned].tolist()) == "yes"


def talk(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


def learned_texts(row, tokenizer):
    """What is learned from, with ``.`` for EOS, gaps as ``|``."""
    out, before = "", False
    for token, learned in zip(row["tokens"].tolist(), row["target_mask"].tolist(), strict=True):
        out += "|" * (learned and not before)
        out += ("." if token == EOS else tokenizer.decode([token])) * learned
        before = learned
    return out


def test_of_a_chat_the_last_reply_is_learned_from_or_all_of_them(chatty):
    records = [{"talk": talk("hi", "yo", "so", "end")}, {"talk": talk("a", "b")}]
    options = {"seq_len": 48, "messages_column": "talk"}
    assert [learned_texts(row, chatty) for row in rows(chatty, records, **options)] == ["|end.", "|b."]
    every = rows(chatty, records, **options, learn_from="all")
    assert [learned_texts(row, chatty) for row in every] == ["|yo.|end.", "|b."]
    assert every[0]["record"] == records[0]


def test_a_system_text_begins_chats_that_have_none(chatty):
    own = [{"role": "system", "content": "own"}, *talk("a", "b")]
    made = rows(
        chatty, [{"messages": talk("a", "b")}, {"messages": own}], seq_len=40, messages_column="messages", system="s"
    )
    assert [chatty.decode(row["tokens"].tolist()) for row in made] == ["<s>s\n<u>a\n<a>b", "<s>own\n<u>a\n<a>b"]


def test_keys_that_only_other_messages_have_are_not_there(tokenizer_dir):
    named = "{% for m in messages %}{{ m.name if 'name' in m else '-' }}{{ m.content }}{% endfor %}"
    template = ChatTemplate(named, variables={"eos_token": "<eos>"}, special_tokens=[])
    tokenizer = HFTokenizer(load_tokenizer(tokenizer_dir)._tokenizer, bos_id=None, eos_id=EOS, chat_template=template)
    chat = [{"role": "user", "content": "a", "name": "n"}, {"role": "assistant", "content": "b"}]
    [row] = rows(tokenizer, [{"messages": chat}], messages_column="messages")
    assert tokenizer.decode(row["tokens"].tolist()) == "na-b"


def test_a_torchtune_tokenizer_gives_the_same_rows_if_it_adds_nothing_unasked(tokenizer, tokenizer_dir):
    class TorchtuneTokenizer(HuggingFaceBaseTokenizer):
        pad_id = EOS

    files = [tokenizer_dir / name for name in ("tokenizer.json", "tokenizer_config.json")]
    with pytest.raises(ValueError, match=r"adds \[0\] to every text"):
        rows(TorchtuneTokenizer(str(files[0]), tokenizer_config_json_path=str(files[1])), pairs("ab|c"))
    files[0].write_text(json.dumps(json.loads(files[0].read_text()) | {"post_processor": None}))
    other = TorchtuneTokenizer(str(files[0]), tokenizer_config_json_path=str(files[1]))
    ours, theirs = (rows(each, pairs("ab|c", "a|bc"), add_bos=True) for each in (tokenizer, other))
    assert ours.fingerprint == theirs.fingerprint


def test_what_was_read_is_said(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        made = rows(tokenizer, pairs("ab|c", "a|bcd", "abcdef|ab", "abcdefgh|"), too_long="drop", add_eos=False)
    # 3 + 4 tokens kept, 1 + 3 of them learned from; the third record has 8 tokens, the last one no completion.
    assert "4 of 4 records read: 3 in 3 rows of 8, 0 dropped as too long, 1 for want of a token" in caplog.text
    assert f"15 tokens, 40% learned from; fingerprint {made.fingerprint[:12]}" in caplog.text


def test_max_rows_keeps_the_first_records_and_reads_no_further(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        made = rows(tokenizer, pairs("abcdefgh|c", "a|b", "b|a", "c|c"), max_rows=2)
    assert [row["record"]["prompt"] for row in made] == ["a", "b"]
    assert "3 of 4 records read: 2 in 2 rows of 8, 1 dropped as too long" in caplog.text


def test_the_fingerprint_is_that_of_rows_and_records(tokenizer):
    base = rows(tokenizer, pairs("ab|c", "a|b")).fingerprint
    assert base == rows(tokenizer, pairs("ab|c", "a|b")).fingerprint
    tests = [{**record, "tests": number} for number, record in enumerate(pairs("ab|c", "a|b"))]
    others = [
        rows(tokenizer, pairs("ab|c", "a|c")),  # a token
        rows(tokenizer, pairs("a|bc", "a|b")),  # what is learned from
        rows(tokenizer, pairs("ab|c", "a|b"), packed=True),
        rows(tokenizer, pairs("ab|c", "a|b"), seq_len=9),
        rows(tokenizer, tests),  # what a verifier asks
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len is 1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"prompt_column": "promt"}, "no column 'promt'; did you mean 'prompt'?"),
        ({"completion_column": "zzz"}, "no column 'zzz'; choose from prompt, completion, number, empty"),
        ({"completion_column": "empty"}, "record 0 of dataset.source: column 'empty' holds None, not text"),
        ({"template": "{prompts}"}, "no column 'prompts'; did you mean 'prompt'?"),
        ({"template": "{prompt"}, r"template '{prompt' cannot be read .* write {{ and }} for braces"),
        ({"template": "{}"}, "names no column, or asks for a format"),
        ({"template": "{prompt!r}"}, "names no column, or asks for a format"),
        ({"system": "s"}, "set chat: true, or write it into template"),
        ({"chat": True, "add_bos": True}, "remove add_bos"),
        ({"messages_column": "prompt", "template": "{prompt}"}, "remove one"),
        ({"messages_column": "empty"}, "record 0 of dataset.source: there are no messages"),
        ({"seq_len": 3, "too_long": "error"}, "record 0 of dataset.source has 4 tokens, seq_len is 3"),
        ({"seq_len": 2, "too_long": "truncate"}, "of 1 records .* none is left: 0 are longer than seq_len 2, of 1 no"),
    ],
)
def test_what_cannot_be_rows_is_refused(chatty, options, message):
    records = [{"prompt": "ab", "completion": "c", "number": 1, "empty": None}]
    with pytest.raises(ValueError, match=message):
        rows(chatty, records, **options)


def test_a_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template; put chat_template.jinja beside its tokenizer.json"):
        rows(tokenizer, pairs("a|b"), chat=True)
