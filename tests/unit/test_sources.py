"""``components.data.sources``: which files and rows become documents and records."""

import json
import logging
import re

import datasets
import pytest

from components.data import load_records, load_text, split_by_group, stream_text


@pytest.fixture(autouse=True)
def own_cache_and_no_hub(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


def write(folder, **files):
    """Files named by keyword: ``sub__a_py`` is ``sub/a.py``."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_text_file_is_one_document_in_the_order_of_names(folder):
    write(folder, b_py="second\nline\n", a_md="first", sub__c_txt="Dritter: ü")
    documents = load_text(str(folder))
    assert documents["text"][:] == ["first", "second\nline\n", "Dritter: ü"]
    assert documents["group"][:] == [str(folder / name) for name in ("a.md", "b.py", "sub/c.txt")]


def test_a_glob_and_a_file_name_what_to_read(folder):
    write(folder, a_py="a", b_txt="b", sub__c_py="c")
    assert load_text(str(folder / "**" / "*.py"))["text"][:] == ["a", "c"]
    assert load_text(str(folder / "b.txt"))["text"][:] == ["b"]


@pytest.mark.parametrize("kind", ["json", "csv", "parquet"])
def test_every_row_is_one_document(folder, kind):
    rows = datasets.Dataset.from_dict({"id": [1, 2], "code": ["a\n", "b"], "text": ["not", "these"]})
    path = folder / f"rows.{kind}"
    getattr(rows, f"to_{kind}")(path)
    documents = load_text(str(path), column="code")
    assert documents.column_names == ["text", "group"]
    assert documents["text"][:] == ["a\n", "b"]
    assert documents["group"][:] == [f"{path} row 0", f"{path} row 1"]


def test_row_files_of_a_folder_named_after_splits_are_kept_apart(folder):
    write(folder, train_jsonl=jsonl({"text": "t"}), validation_jsonl=jsonl({"text": "v"}))
    assert load_text(str(folder))["text"][:] == ["t"]
    assert load_text(str(folder), split="validation")["text"][:] == ["v"]
    with pytest.raises(ValueError, match=r"split 'test' \(.*train.*validation"):
        load_text(str(folder), split="test")


def test_a_changed_file_is_read_anew(folder):
    write(folder, a_jsonl=jsonl({"text": "old"}))
    load_text(str(folder))
    write(folder, a_jsonl=jsonl({"text": "newer"}))
    assert load_text(str(folder))["text"][:] == ["newer"]


def test_blank_documents_are_dropped_and_counted(folder, caplog):
    write(folder, a_jsonl=jsonl({"text": "a"}, {"text": " \n\t"}, {"text": ""}, {"text": None}, {"text": "b"}))
    with caplog.at_level(logging.INFO):
        assert load_text(str(folder))["text"][:] == ["a", "b"]
    assert "2 documents, 3 blank ones dropped" in caplog.text


def test_max_documents_keeps_the_first(folder):
    write(folder, a_jsonl=jsonl(*({"text": str(i)} for i in range(5))))
    assert load_text(str(folder), max_documents=2)["text"][:] == ["0", "1"]
    assert len(load_text(str(folder), max_documents=9)) == 5


def test_rows_keep_their_group_and_their_number_when_blank_ones_are_dropped(folder):
    rows = [{"text": "a", "group": "m"}, {"text": " ", "group": "m"}, {"text": "b", "group": "n"}]
    write(folder, a_jsonl=jsonl(*rows), b_jsonl=jsonl(*({"text": row["text"]} for row in rows)))
    assert load_text(str(folder / "a.jsonl"))["group"][:] == ["m", "n"]
    path = str(folder / "b.jsonl")
    assert load_text(path)["group"][:] == [f"{path} row 0", f"{path} row 2"]
    assert load_text(str(folder / "a.jsonl"), column="group")[:]["text"] == ["m", "m", "n"]


def test_texts_are_split_by_file_and_by_group(folder):
    write(folder, **{f"sub__{number}_txt": f"text {number // 3}" for number in range(60)})
    write(folder, rows__a_jsonl=jsonl(*({"text": f"text {i}", "group": i // 3} for i in range(60))))
    for path, groups in (("sub", 60), ("rows", 20)):
        parts = []
        for part in ("train", "validation"):
            source, stream = load_text(str(folder / path)), stream_text(str(folder / path))
            kept = split_by_group(source, part=part, fraction=0.4)
            streamed = list(split_by_group(stream, part=part, fraction=0.4))
            assert streamed == list(kept)
            parts.append({row["group"] for row in kept})
        assert not parts[0] & parts[1]
        assert len(parts[0] | parts[1]) == groups


def test_nothing_is_written_beside_the_data(folder):
    write(folder, a_jsonl=jsonl({"text": "a"}, {"text": ""}))
    load_text(str(folder)).map(lambda row: row)
    assert [path.name for path in folder.rglob("*")] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, "holds no files"),
        ({"a_jsonl": "{}\n", "b_py": "x", "c_py": "x"}, {}, r"several kinds \(1 json, 2 text\)"),
        ({"a_jsonl": jsonl({"body": "x", "id": 1})}, {}, "no column 'text' .* one of body, id"),
        ({"a_jsonl": jsonl({"body": "x", "id": 1})}, {"column": "id"}, "column 'id' .* holds int64, not text"),
        ({"a_jsonl": jsonl({"text": ["x"]})}, {}, "column 'text' .* holds structure, not text"),
        ({"a_py": "x"}, {"column": "code"}, "no column 'code' .* one of text"),
        ({"a_jsonl": '{"text": "x"\n'}, {}, "cannot be read as json"),
        ({"a_py": "x"}, {"split": "validation"}, "split 'validation' .* is text files"),
        ({"a_py": "x"}, {"name": "python"}, "name 'python' .* leave name out"),
        ({"a_py": " \n"}, {}, r"no text in .*\(blank documents: 1\)"),
        ({"a_py": "x"}, {"max_documents": 0}, "max_documents is 0"),
    ],
)
def test_what_cannot_be_documents_is_refused(folder, files, options, message):
    write(folder, **files)
    with pytest.raises(ValueError, match=message):
        load_text(str(folder), **options)


def test_a_file_that_is_not_text_is_named(folder):
    write(folder, a_py="x")
    (folder / "b.pyc").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=re.escape(str(folder / "b.pyc")) + " is not UTF-8 text"):
        load_text(str(folder))


@pytest.mark.parametrize("path", ["data/missing.jsonl", "./missing", "a/b/c", "/missing/*.py", "~/missing"])
def test_a_path_that_cannot_be_on_the_hub_is_never_asked_for(path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=r"no file, folder or glob .* cannot be a dataset id"):
        load_text(path)


def test_a_dataset_id_that_cannot_be_loaded_is_explained():
    with pytest.raises(ValueError, match=r"no file, .* hub \(name None, split 'train'\) it cannot be loaded"):
        load_text("nobody/nothing")


RECORDS = [
    {"prompt": "p", "tests": [{"expression": "f(2)", "expected": "[1, 4]"}], "n": 1},
    {"prompt": "", "tests": [], "n": 2},
    {"prompt": None, "tests": [], "n": 3},
]


def test_records_keep_all_rows_and_columns(folder):
    write(folder, a_jsonl=jsonl(*RECORDS))
    assert list(load_records(str(folder / "a.jsonl"))) == RECORDS
    assert list(load_records(str(folder / "a.jsonl"), max_records=2)) == RECORDS[:2]
    assert len(load_records(str(folder / "a.jsonl"), max_records=9)) == 3


def test_records_are_read_no_further_than_asked_for(folder):
    write(folder, a_jsonl=jsonl(*RECORDS), b_jsonl=jsonl(*RECORDS), c_jsonl="no json")  # it looks one file ahead
    assert list(load_records(str(folder), max_records=2, streaming=True)) == RECORDS[:2]
    for options in ({"max_records": 2}, {"max_records": 9, "streaming": True}):
        with pytest.raises(ValueError, match="cannot be read"):
            load_records(str(folder), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_records": 0}, "max_records is 0"),
        ({"streaming": True}, "all records are asked for; set max_records"),
        ({"split": "test"}, "split 'test'"),
        ({"name": "python"}, "leave name out"),
    ],
)
def test_what_cannot_be_records_is_refused(folder, options, message):
    write(folder, a_jsonl=jsonl(*RECORDS))
    with pytest.raises(ValueError, match=message):
        load_records(str(folder), **options)


def test_a_stream_gives_the_documents_of_load_text(folder):
    texts = ["a", " ", "", "ü\n", "b"]
    write(folder, **{f"sub__{number}_txt": text for number, text in enumerate(texts)})
    write(folder, rows__a_jsonl=jsonl(*({"code": text} for text in texts)), rows__b_jsonl=jsonl({"code": "c"}))
    for path, column, expected in (("sub", "text", ["a", "ü\n", "b"]), ("rows", "code", ["a", "ü\n", "b", "c"])):
        stream = stream_text(str(folder / path), column=column)
        assert [row["text"] for row in stream] == expected == load_text(str(folder / path), column=column)["text"][:]


@pytest.mark.parametrize(
    ("column", "message"), [("body", "no column 'body' .* one of id, text"), ("id", "int64, not text")]
)
def test_a_stream_without_text_is_refused_before_it_is_read(folder, column, message):
    write(folder, a_jsonl=jsonl({"id": 1, "text": "a"}))
    with pytest.raises(ValueError, match=message):
        stream_text(str(folder), column=column)
