"""Configuration: what is wrong is refused with its place, what is right is built."""

import contextlib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from components.training import (
    check_keys,
    diff_configs,
    instantiate,
    load_config,
    parse_args,
    save_config,
    validate_config,
    written_out,
)

PARTS = """
from typing import Literal, Protocol

class Anchors(Protocol):
    def __call__(self, batch) -> list: ...

class Strided:
    def __init__(self, *, stride: int, context_len: int = 8, region: Literal["all", "target"] = "all"):
        if stride < 1:
            raise ValueError(f"stride is {stride}; it must be at least 1")
        self.stride, self.context_len = stride, context_len

    def __call__(self, batch):
        return []

class Generator:
    def __init__(self, *, anchors: Anchors, temperature: float, top_p: float = 1.0, stop_tokens: list[int] | None = None):
        self.anchors, self.temperature, self.stop_tokens = anchors, temperature, stop_tokens

class Reward:
    def __init__(self, coef: "float" = 1.0):
        self.coef = coef

class Sum:
    def __init__(self, parts: list, named: dict[str, Reward] | None = None):
        self.parts, self.named = parts, named

class Nothing:
    pass

def words(tokenizer, source: str, split: "NotImported" = "train"):
    return tokenizer, source, split

def anything(**options):
    return options

def joins(a, b):
    return a + b
"""

# A whole run, in small: torch, torchtune, and the parts above.
CONFIG = """
output_dir: out
seed: 1
rollout_len: 8
model:
  _component_: torchtune.models.qwen2.qwen2
  vocab_size: 32
  num_layers: 1
  num_heads: 2
  num_kv_heads: 1
  embed_dim: 8
  intermediate_dim: 16
  max_seq_len: ${rollout_len}
dataset:
  _component_: parts.words
  source: text.jsonl
generator:
  _component_: parts.Generator
  anchors:
    _component_: parts.Strided
    stride: 8
    context_len: ${rollout_len}
  temperature: 0.6
  stop_tokens: [1, 2]
reward:
  _component_: parts.Sum
  parts:
    - _component_: parts.Reward
      coef: 2
    - _component_: parts.Reward
  named:
    first: {_component_: parts.Reward, coef: 0.5}
optimizer:
  _component_: torch.optim.AdamW
  lr: 1e-6
  betas: [0.9, 0.95]
  fused: null
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}
"""
KEYS = list(OmegaConf.create(CONFIG))


@pytest.fixture(autouse=True, scope="module")
def _working_directory(tmp_path_factory):
    """A directory with parts.py in it, as a user's own components would lie there."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "parts.py").write_text(PARTS)
    (folder / "needs.py").write_text("import a_library_nobody_has\n")
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        importlib.import_module("parts")
        yield
    sys.modules.pop("parts", None)


def config(text, *overrides):
    Path("some.yaml").write_text(text)
    return load_config("some.yaml", overrides)


def message(call, *args, **kwargs):
    """The sentence a call is refused with."""
    with pytest.raises(ValueError, match=r"\S") as refusal:
        call(*args, **kwargs)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- files and overrides


def test_numbers_are_numbers_and_references_are_followed():
    cfg = load_config("config.yaml")
    assert cfg.optimizer.lr == 1e-6
    assert cfg.generator.anchors.context_len == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "config file some.yaml: line 3: found duplicate key a; correct the YAML there"),
        ("a:\n  b: 1\n  b: 2\n", "config file some.yaml: line 3: found duplicate key b; correct the YAML there"),
        ("a: 1\nb: [2\n", "config file some.yaml: line 3: did not find expected ',' or ']'; correct the YAML there"),
        ("- a\n", "config file some.yaml: there is a list at the top level; write 'key: value' lines"),
        ("a: ${\n", "config file some.yaml: a: no viable alternative at input '${'"),
        ("a:\n  b: ???\n", "config file some.yaml: a.b has no value yet; add a.b=... to the command"),
    ],
)
def test_a_broken_file_is_refused_by_file_and_line(text, says):
    assert message(config, text) == says


def test_a_reference_is_followed_when_it_is_used():
    cfg = config("a: {_component_: parts.Reward, coef: '${later}'}")
    says = "a.coef: Interpolation key 'later' not found (config file some.yaml)"
    validate_config(cfg)
    assert message(instantiate, cfg.a, path="a") == says
    assert message(save_config, cfg, "out") == says
    cfg.later = 3
    assert instantiate(cfg.a, path="a").coef == 3
    cfg.later = "three"
    assert message(instantiate, cfg.a, path="a").startswith("a.coef: parts.Reward wants float, not 'three'")


def test_a_missing_file_is_refused_by_name():
    assert "config file nowhere.yaml: " in message(load_config, "nowhere.yaml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=2", "seed", 2),
        ("seed=None", "seed", None),
        ("seed=null", "seed", None),
        ("optimizer.lr=3e-6", "optimizer.lr", 3e-6),
        ("optimizer.betas=[0.8]", "optimizer.betas", [0.8]),
        ("optimizer.betas.0=0.8", "optimizer.betas", [0.8, 0.95]),
        ("output_dir=a=b", "output_dir", "a=b"),
        ("output_dir=a/${seed}", "output_dir", "a/1"),
        ("rollout_len=4", "generator.anchors.context_len", 4),
        ("generator.top_p=0.9", "generator.top_p", 0.9),
        ("generator.anchors=parts.Other", "generator.anchors._component_", "parts.Other"),
        ("generator.anchors=parts.Other", "generator.anchors.stride", 8),
        ("metric_logger=null", "metric_logger", None),
        ("reward.parts[1].coef=3", "reward.parts[1].coef", 3),
        ("~generator.stop_tokens", "generator.stop_tokens", None),
        ("~metric_logger", "metric_logger", None),
    ],
)
def test_an_override_changes_what_it_names(override, key, value):
    assert OmegaConf.select(load_config("config.yaml", [override]), key) == value


def test_overrides_apply_in_their_order():
    assert load_config("config.yaml", ["seed=2", "~seed", "seed=3"]).seed == 3
    assert "seed" not in load_config("config.yaml", ["seed=2", "~seed"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "write key=value, or ~key to remove a key"),
        ("=1", "write key=value, or ~key to remove a key"),
        ("a..b=1", "write key=value, or ~key to remove a key"),
        ("~sed", "there is no 'sed' to remove; did you mean 'seed'?"),
        ("~generator.anchors.strde", "there is no 'generator.anchors.strde' to remove; did you mean 'stride'?"),
        ("~seed=1", "there is no 'seed=1' to remove; did you mean 'seed'?"),
        ("~seed.a", "there is no 'seed.a' to remove; choose from none"),
        ("seed.a=1", "seed is 1 and has no keys"),
        ("optimizer.betas.7=1", "optimizer.betas[7]: list index out of range"),
        ("optimizer.betas.x=1", "invalid literal for int() with base 10: 'x'"),
        ("seed=[1", "did not find expected ',' or ']'; correct the value, which is read as YAML"),
    ],
)
def test_a_broken_override_is_refused_by_name(override, says):
    assert message(load_config, "config.yaml", [override]) == f"override {override!r} of config.yaml: {says}"


@given(key=st.text("abdes.[]~=\\", max_size=8), value=st.text(max_size=8) | st.text("{}[]$:,'a? ", max_size=8))
def test_whatever_an_override_says_it_is_applied_or_refused(key, value):
    with contextlib.suppress(ValueError):
        load_config("config.yaml", [f"{key}={value}"])


@pytest.mark.parametrize(
    "line",
    [
        "--config config.yaml seed=2 ~output_dir ~metric_logger",
        "~metric_logger seed=2 --config config.yaml ~output_dir",
    ],
)
def test_a_command_line_is_a_file_and_overrides(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *line.split()])
    assert parse_args() == load_config("config.yaml", ["seed=2", "~metric_logger", "~output_dir"])


@pytest.mark.parametrize("line", ["seed=2", "--conf config.yaml", "--config config.yaml --seed 2"])
def test_a_command_line_has_no_other_options(line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", *line.split()])
    with pytest.raises(SystemExit):
        parse_args()


# --- top-level keys


def test_known_keys_pass():
    check_keys(load_config("config.yaml"), KEYS, required=["model", "generator"])


def test_an_unknown_key_is_refused_with_the_nearest_one():
    cfg = load_config("config.yaml", ["optimiser.lr=1"])
    assert message(check_keys, cfg, KEYS) == (
        "optimiser: there is no such key; did you mean 'optimizer'? (config file config.yaml)"
    )


def test_a_missing_key_is_named():
    cfg = load_config("config.yaml", ["~model"])
    says = "model: this key is missing; add it (config file config.yaml)"
    assert message(check_keys, cfg, KEYS, required=["model"]) == says


def test_keys_of_a_plain_mapping_are_checked_with_their_place():
    cfg = config("validation: {every_n_step: 5}")
    assert message(check_keys, cfg.validation, ["every_n_steps"], path="validation") == (
        "validation.every_n_step: there is no such key; did you mean 'every_n_steps'? (config file some.yaml)"
    )


def test_a_value_where_a_mapping_belongs_is_refused():
    says = message(check_keys, config("validation: 5").validation, ["every_n_steps"], path="validation")
    assert says == "validation: is 5; write a mapping with every_n_steps"


# --- building


def test_what_is_nested_is_built_first():
    cfg = load_config("config.yaml")
    generator = instantiate(cfg.generator, path="generator")
    assert generator.anchors.stride == 8
    assert generator.stop_tokens == [1, 2]
    reward = instantiate(cfg.reward, path="reward")
    assert [part.coef for part in reward.parts] == [2, 1.0]
    assert reward.named["first"].coef == 0.5


def test_components_of_torch_and_torchtune_are_built():
    cfg = load_config("config.yaml")
    model = instantiate(cfg.model, path="model")
    optimizer = instantiate(cfg.optimizer, path="optimizer", params=model.parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-6
    assert optimizer.param_groups[0]["params"] == list(model.parameters())


def test_what_the_recipe_gives_reaches_only_the_outermost_component():
    assert instantiate(load_config("config.yaml").dataset, path="dataset", tokenizer="T")[0] == "T"
    nested = config("outer: {_component_: parts.anything, inner: {_component_: parts.anything}}").outer
    assert instantiate(nested, path="outer", x=1) == {"inner": {}, "x": 1}


def test_what_the_recipe_offers_reaches_every_component_that_has_such_an_argument_open():
    inner = "{_component_: parts.joins, b: 2}"
    cfg = config(f"outer: {{_component_: parts.anything, open: {inner}, other: {{_component_: parts.Nothing}}}}").outer
    assert instantiate(cfg, path="outer", offered={"a": 1})["open"] == 3
    given = config("outer: {_component_: parts.joins, a: 5, b: 2}").outer
    assert instantiate(given, path="outer", offered={"a": 1, "b": 1}) == 7
    assert "outer.open: parts.joins needs the argument 'a'" in message(instantiate, cfg, path="outer")


def test_building_leaves_the_config_as_it_was():
    cfg = load_config("config.yaml")
    instantiate(cfg.generator, path="generator")
    assert cfg == load_config("config.yaml")


def test_a_component_written_in_c_takes_its_arguments():
    cfg = config("a: {_component_: builtins.dict, x: 1}")
    assert instantiate(cfg.a, path="a") == {"x": 1}


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (
            "_component_: parts.Strided\n  strde: 8",
            "a.strde: parts.Strided has no argument 'strde'; did you mean 'stride'?",
        ),
        (
            "_component_: parts.Strided\n  stride: 8\n  zzz: 8",
            "a.zzz: parts.Strided has no argument 'zzz'; choose from context_len, region, stride",
        ),
        ("_component_: parts.Nothing\n  b: 8", "a.b: parts.Nothing has no argument 'b'; choose from none"),
        ("_component_: parts.Nothing\n  3: 8", "a[3]: parts.Nothing has no argument 3; choose from none"),
        ("_component_: parts.Strided", "a: parts.Strided needs the argument 'stride'; add it"),
        ("_component_: parts.Strided\n  stride: 0", "a: stride is 0; it must be at least 1"),
        ("_component_: parts.joins\n  a: 1\n  b: x", "a: unsupported operand type(s) for +: 'int' and 'str'"),
        (
            "_component_: parts.Sum\n  parts: [1, {_component_: parts.Strided, stride: 0}]",
            "a.parts[1]: stride is 0; it must be at least 1",
        ),
        (
            "_component_: parts.anything\n  b: {c: {_component_: parts.Strided, sride: 8}}",
            "a.b.c.sride: parts.Strided has no argument 'sride'; did you mean 'stride'?",
        ),
        ("_component_: parts.Stride", "a._component_: parts has no 'Stride'; did you mean 'Strided'?"),
        ("_component_: part.Strided", "a._component_: Python has no 'part'; did you mean 'parts'?"),
        ("_component_: torch.optm.AdamW", "a._component_: torch has no 'optm'; did you mean 'optim'?"),
        ("_component_: torch.optim.AdmW", "a._component_: torch.optim has no 'AdmW'; did you mean 'AdamW'?"),
        (
            "_component_: components.trainin.checkpoint.X",
            "a._component_: components has no 'trainin'; did you mean 'training'?",
        ),
        (
            "_component_: parts.Strided.__cal__",
            "a._component_: parts.Strided has no '__cal__'; choose from none",
        ),
        (
            "_component_: needs.Thing",
            "a._component_: needs cannot be imported: No module named 'a_library_nobody_has'",
        ),
        ("_component_: torch.optim", "a._component_: torch.optim is a module; name a class or function"),
        ("_component_: AdamW", "a._component_: 'AdamW' is not a dotted name; write one such as torch.optim.AdamW"),
        ("_component_: 5", "a._component_: 5 is not a dotted name; write one such as torch.optim.AdamW"),
        (
            "_component_: parts.anything\n  _partial_: true",
            "a._partial_: there is no such key; the only one of its kind is _component_",
        ),
        (
            "_component_: parts.anything\n  b: {_componet_: parts.Strided}",
            "a.b._componet_: there is no such key; the only one of its kind is _component_",
        ),
    ],
)
def test_a_wrong_node_is_refused_with_its_place(node, says):
    cfg = config(f"a:\n  {node}\n")
    assert message(instantiate, cfg.a, path="a") == f"{says} (config file some.yaml)"


def test_a_constructors_error_is_kept_as_the_cause():
    with pytest.raises(ValueError, match="a: stride is 0") as refusal:
        instantiate(config("a: {_component_: parts.Strided, stride: 0}").a, path="a")
    assert str(refusal.value.__cause__) == "stride is 0; it must be at least 1"


@pytest.mark.parametrize("node", ["null", "3", "parts.Reward", "{coef: 1}", "[{_component_: parts.Reward}]"])
def test_what_is_no_component_is_refused(node):
    assert message(instantiate, config(f"a: {node}").a, path="a").startswith("a: is ")


def test_nothing_is_built_when_anything_is_wrong(tmp_path):
    log_dir = tmp_path / "log"
    text = f"""
a:
  _component_: parts.Sum
  parts:
    - {{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: {log_dir}}}
    - {{_component_: parts.Strided, strde: 8}}
"""
    message(instantiate, config(text).a, path="a")
    assert not log_dir.exists()


def test_the_recipe_and_the_config_may_not_give_the_same_argument():
    says = "dataset.source: the recipe gives this argument; remove the key (config file config.yaml)"
    assert message(instantiate, load_config("config.yaml").dataset, path="dataset", source="x") == says


def test_a_component_that_cannot_take_what_the_recipe_gives_is_refused():
    assert message(instantiate, load_config("config.yaml").reward, path="reward", tokenizer="T") == (
        "reward: parts.Sum has no argument 'tokenizer', which the recipe gives; choose another component "
        "(config file config.yaml)"
    )


def test_components_in_the_working_directory_are_found(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def make():\n    return 'mine'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert instantiate(config("a: {_component_: mine.make}").a, path="a") == "mine"


# --- types


INT, FLOAT, BOOL, STR, NONE, LIST = 8, 8.0, True, "8", None, [8]


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (int, [INT], [FLOAT, BOOL, STR, NONE, LIST]),
        (float, [INT, FLOAT], [BOOL, STR, NONE, LIST, "1e-5"]),
        (bool, [BOOL], [INT, FLOAT, STR, NONE]),
        (str, [STR], [INT, FLOAT, BOOL, NONE, LIST]),
        (int | None, [INT, NONE], [FLOAT, BOOL, STR]),
        (str | None, [STR, NONE], [INT, "None"]),
        (Literal["a", 1], ["a", 1], ["b", True, NONE]),
        (list[int], [[], [1, 2]], [INT, STR, [1, "2"], [1, 2.0]]),
        (list[list[int]], [[[1]]], [[1]]),
        (Sequence[str], [["a"]], ["a", [1]]),
        (tuple[float, float], [[1, 0.5]], [[1], [1, 2, 3], [1, "2"], 1]),
        (tuple[int, ...], [[], [1, 2, 3]], [[1, "2"], 1]),
        (list, [[], [1, "a"]], [INT]),
        (dict[str, int], [{"a": 1}], [INT, LIST]),
        (float | torch.Tensor, [INT, FLOAT], ["1e-5", BOOL, NONE]),  # an optimizer's lr
        (Path | None, ["a", NONE], []),  # a path may well be given as text
        (torch.dtype, ["bf16"], []),
        (torch.nn.Module, [], [STR, INT, {"stride": 8}]),
        (Callable[[int], int], [], [STR]),
        (Callable | None, [NONE], [STR]),
        (Any, [INT, STR, NONE, LIST], []),
        ("Unknown", [INT, STR, NONE, LIST], []),
        (inspect.Parameter.empty, [INT, STR, NONE, LIST], []),
    ],
)
def test_a_value_is_compared_with_the_annotation(annotation, good, bad):
    def component(value):
        return value

    component.__annotations__["value"] = annotation
    sys.modules["parts"].component = component
    for value in good:
        node = OmegaConf.create({"_component_": "parts.component", "value": value})
        assert instantiate(node, path="a") == value
    for value in bad:
        node = OmegaConf.create({"_component_": "parts.component", "value": value})
        assert message(instantiate, node, path="a").startswith("a.value: parts.component wants ")


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ("{_component_: parts.Strided, stride: 'eight'}", "a.stride: parts.Strided wants int, not 'eight' (str)"),
        (
            "{_component_: parts.Strided, stride: 8, region: some}",
            "a.region: parts.Strided wants Literal['all', 'target'], not 'some' (str)",
        ),
        (
            "{_component_: parts.Generator, anchors: parts.Strided, temperature: 1}",
            "a.anchors: parts.Generator wants parts.Anchors, not 'parts.Strided' (str)",
        ),
        ("{_component_: parts.Reward, coef: '1'}", "a.coef: parts.Reward wants float, not '1' (str)"),
        (
            "{_component_: torch.optim.AdamW, lr: '1e-5'}",
            "a.lr: torch.optim.AdamW wants float | torch.Tensor, not '1e-5' (str)",
        ),
        (
            "{_component_: torchao.optim.AdamW8bit, lr: '1e-5'}",
            "a.lr: torchao.optim.AdamW8bit wants float, not '1e-5' (str)",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_is_wanted(node, says):
    assert message(validate_config, config(f"a: {node}")) == f"{says} (config file some.yaml)"


def test_null_is_good_wherever_it_is_the_default():
    cfg = config(
        "a: {_component_: torchtune.models.qwen2.qwen2_tokenizer, merges_file: null}"
    )  # merges_file: str = None
    validate_config(cfg)


# --- whole configs


def test_a_right_config_is_valid_without_what_the_recipe_gives():
    validate_config(load_config("config.yaml"))


def nodes_of(value, path=""):
    """Path and content of every component."""
    if isinstance(value, dict) and "_component_" in value:
        yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from nodes_of(inner, f"{path}.{key}" if path else key)
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from nodes_of(inner, f"{path}[{index}]")


ARGUMENTS = [
    (path, key)
    for path, node in nodes_of(OmegaConf.to_container(OmegaConf.create(CONFIG)))
    for key in node
    if key != "_component_" and path != "metric_logger"  # which takes **kwargs
]


@given(data=st.data())
def test_a_slip_in_any_key_is_refused_with_its_place_and_the_right_key(data):
    path, key = data.draw(st.sampled_from(ARGUMENTS + [("", key) for key in KEYS]))
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    slips = [key[:at] + key[at + 1 :], key[:at] + letter + key[at:], key[:at] + letter + key[at + 1 :]]
    slip = data.draw(st.sampled_from(slips).filter(lambda slip: slip != key and not slip.startswith("_")))

    cfg = load_config("config.yaml")
    holder = OmegaConf.select(cfg, path) if path else cfg
    holder[slip] = holder.pop(key)
    place = f"{path}.{slip}" if path else slip
    says = message(validate_config, cfg) if path else message(check_keys, cfg, KEYS)
    assert says.startswith(f"{place}: ")
    assert len(key) < 3 or f"did you mean {key!r}?" in says


# --- output directory


def test_what_is_saved_reads_back_resolved(tmp_path):
    cfg = load_config("config.yaml")
    save_config(cfg, tmp_path / "new" / "out")
    assert [file.name for file in (tmp_path / "new" / "out").iterdir()] == ["config.yaml"]
    assert "${" not in (tmp_path / "new" / "out" / "config.yaml").read_text()
    assert diff_configs(load_config(tmp_path / "new" / "out" / "config.yaml"), cfg) == []


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_characters="$\\?"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@given(values=st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES))
def test_whatever_a_config_holds_reads_back_as_it_was(values, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "saved"
    save_config(OmegaConf.create(values), folder)
    assert diff_configs(load_config(folder / "config.yaml"), OmegaConf.create(values)) == []


def test_a_difference_names_the_key_and_both_values():
    a = config("optimizer: {lr: 1e-6, fused: true}\nlayers: [1, 2]\nonly_a: x\nsame: 1\nempty: {}\n")
    b = config("optimizer: {lr: 3e-6, fused: 1}\nlayers: [1]\nsame: 1\nonly_b: {c: null}\n")
    assert diff_configs(a, b) == [
        "empty: {} -> absent",
        "layers: [1, 2] -> [1]",
        "only_a: 'x' -> absent",
        "only_b.c: absent -> None",
        "optimizer.fused: True -> 1",
        "optimizer.lr: 1e-06 -> 3e-06",
    ]


def test_a_file_changes_its_base_key_by_key(tmp_path):
    """Mappings merge, lists and other components replace, and references see the result; two files deep."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "top.yaml").write_text(
        "seed: 1\nlength: 8\nmodel: {_component_: a.B, x: 1, y: '${length}'}\nlist: [1, 2]\nloss: {_component_: a.L, ce: 0.1}\n"
    )
    (tmp_path / "sub" / "middle.yaml").write_text("base: ../top.yaml\nmodel: {x: 2}\nlength: 16\n")
    (tmp_path / "sub" / "mine.yaml").write_text(
        "base: middle.yaml\nlist: [3]\nloss: {_component_: a.M}\nmodel: {_component_: a.B, z: 3}\n"
    )
    cfg = load_config(tmp_path / "sub" / "mine.yaml", ["model.x=5"])
    assert OmegaConf.to_container(cfg, resolve=True) == {
        "seed": 1,
        "length": 16,
        "model": {"_component_": "a.B", "x": 5, "y": 16, "z": 3},
        "list": [3],
        "loss": {"_component_": "a.M"},
    }


SCALARS = st.integers(0, 3) | st.sampled_from(["x", "y"])
MAPPINGS = st.dictionaries(
    st.sampled_from("abc"), SCALARS | st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=2), max_size=3
)


@given(files=st.lists(MAPPINGS, min_size=1, max_size=4), own=MAPPINGS)
def test_a_list_of_bases_is_a_chain_of_single_ones(files, own):
    """Each file of the list changes those before it, as if it named them as its base."""
    for number, values in enumerate([*files, own]):
        chained = {"base": f"chain_{number - 1}.yaml"} if number else {}
        Path(f"chain_{number}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(chained | values)))
        Path(f"part_{number}.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    bases = [f"part_{number}.yaml" for number in range(len(files))]
    Path("listed.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"base": bases} | own)))
    assert load_config("listed.yaml") == load_config(f"chain_{len(files)}.yaml")


def test_a_config_with_bases_is_written_out_as_one_that_needs_no_other_file(tmp_path):
    (tmp_path / "part.yaml").write_text("# why 1\nseed: 1\nlr: 1.0e-06\n")
    alone, based = tmp_path / "alone.yaml", tmp_path / "based.yaml"
    alone.write_text("# alone\nseed: 2  # why 2\n")
    based.write_text("# of two\n#   tune run\nbase: [part.yaml, alone.yaml]\noutput_dir: out/${seed}\n")
    assert written_out(alone) == alone.read_text()
    copy = tmp_path / "elsewhere" / "copy.yaml"
    copy.parent.mkdir()
    copy.write_text(written_out(based))
    assert copy.read_text().startswith("# of two\n#   tune run\n#\n# Written out with its bases")
    assert load_config(copy) == load_config(based)
    assert copy.read_text().endswith("\nseed: 2\nlr: 1.0e-06\noutput_dir: out/${seed}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: nowhere.yaml\n", "base: there is no file"),
        ("base: mine.yaml\n", "base leads back to"),
        ("base: [nowhere.yaml]\n", "base: there is no file"),
        ("base: [other.yaml, mine.yaml]\n", "base leads back to"),
        ("base: []\n", "base is []; give the path of a YAML file, from the folder of this one, or a list of them"),
        ("base: [other.yaml, 1]\n", "base is ['other.yaml', 1]; give the path of a YAML file"),
    ],
)
def test_a_base_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("seed: 1\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(path)
