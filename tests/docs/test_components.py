"""docs/components: the options, defaults and choices that the code has, and no others."""

import importlib.util
import inspect
import re
import typing

import pytest
import torch
import yaml

from components.models import parse_dtype
from components.training.schema import OPTIONAL, VALIDATION_OPTIONAL, VALIDATION_REQUIRED
from tests.docs.pages import PAGES, ROOT, read, rows, sections

# What recipes give by themselves.
GIVEN = {"extractor", "max_steps", "optimizer", "output_dir", "policy", "tokenizer"}
SECTIONS = {
    heading.strip("`"): text
    for page in PAGES
    if page.startswith("docs/components/")
    for heading, text in sections(page).items()
    if heading.startswith("`components.")
}
KINDS = ("rollouts", "features", "rewards", "advantages", "losses", "schedules", "evaluation")


def component(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute, None) if importlib.util.find_spec(module) else None


def named_in_yaml():
    """Components that some config, page or test names in YAML."""
    files = [ROOT / page for page in PAGES] + [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/**/*.py")]
    pattern = re.compile(r"(?:_component_: *|[a-z_]=)(components\.\w+\.\w+)")
    names = {name for file in files for name in pattern.findall(file.read_text())}
    return {name for name in names if component(name) is not None}  # tests misspell some


def callable_exports():
    """What the swappable kinds export to be called: classes with ``__call__`` or ``forward`` that can be built."""
    for kind in KINDS:
        module = importlib.import_module(f"components.{kind}")
        for name in getattr(module, "__all__", vars(module)):
            part = getattr(module, name)
            if not inspect.isclass(part) or not part.__module__.startswith(f"components.{kind}"):
                continue
            called = any({"__call__", "forward"} & vars(base).keys() for base in part.__mro__)
            abstract = getattr(part, "_is_protocol", False) or inspect.isabstract(part)
            if called and not abstract and not name.startswith(("No", "_")):
                yield f"components.{kind}.{name}"


def test_every_component_has_a_section():
    inside = {"components.rollouts.Sampler"}  # of the generator
    assert named_in_yaml() | set(callable_exports()) - inside <= SECTIONS.keys()


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_names_exactly_the_options_there_are_with_their_defaults(name):
    signature = inspect.signature(component(name), eval_str=True)
    options = {option: parameter for option, parameter in signature.parameters.items() if option not in GIVEN}
    table = {cells[0].strip("`"): cells[1:] for cells in rows(SECTIONS[name], 3)}
    assert list(table) == list(options), "the order is that of the constructor"
    if not options:
        assert "has no options" in " ".join(SECTIONS[name].split())
    for option, (default, text) in table.items():
        value = options[option].default
        if value is inspect.Parameter.empty:
            assert default == "—", option
        else:
            stated = yaml.safe_load(default)
            stated = parse_dtype(stated) if isinstance(value, torch.dtype) else stated
            assert stated == (list(value) if isinstance(value, tuple) else value), option
        for choice in choices(options[option].annotation):
            assert choice == value or f"`{choice}`" in text, f"{option} does not say that it may be {choice}"


def choices(annotation):
    """The texts that an annotation allows."""
    if typing.get_origin(annotation) is typing.Literal:
        return [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    return [choice for argument in typing.get_args(annotation) for choice in choices(argument)]


def test_the_plain_keys_are_those_of_the_schema():
    table = {cells[0].strip("`") for cells in rows(sections("docs/components/training.md")["Plain keys"], 3)}
    parts = {"generator", "feature_extractor", "reward", "advantage", "lr_scheduler", "reference", "metric_logger"}
    assert table == set(OPTIONAL) - parts - {"max_steps", "epochs"}
    validation = read("docs/components/training.md").split("| `validation` |")[1].splitlines()[0]
    assert all(f"`{key}`" in validation for key in VALIDATION_REQUIRED + VALIDATION_OPTIONAL)


def test_the_plain_keys_have_the_defaults_that_are_read():
    """What is not read with a default is null, or refused if it is missing."""
    sources = "".join(
        path.read_text() for folder in ("components", "recipes") for path in ROOT.glob(f"{folder}/**/*.py")
    )
    for key, default, _ in rows(sections("docs/components/training.md")["Plain keys"], 3):
        read_as = set(re.findall(rf'cfg\.get\("{key[1:-1]}", ([^()]+?)\)', sources)) - {"self.max_steps"}
        assert all(yaml.safe_load(value.lower()) == yaml.safe_load(default) for value in read_as), key


def test_every_page_is_listed():
    listed = re.findall(r"\]\((\w+\.md)\)", read("docs/components/README.md"))
    assert {f"docs/components/{name}" for name in listed} >= {
        page for page in PAGES if page.startswith("docs/components/") and not page.endswith("README.md")
    }
