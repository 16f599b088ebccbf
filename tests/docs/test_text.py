"""What pages say of code: quotes, names, links, keys, YAML and messages are those that there are."""

import ast
import functools
import importlib
import inspect
import re

import pytest
import torch
from omegaconf import OmegaConf

from components.training import schema, validate_config
from tests.docs.pages import PAGES, ROOT, blocks, prose, read, rows
from tests.docs.test_components import SECTIONS, component

QUOTES = [block for page in PAGES for kind in ("yaml", "python") for block in blocks(page, kind) if block.marker]
YAML = [block for page in PAGES for block in blocks(page, "yaml")]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


@pytest.mark.parametrize("block", QUOTES, ids=lambda block: f"{block.page}:{block.line}")
def test_a_quoted_file_is_the_file(block):
    kind, _, path = block.marker.partition(": ")
    assert kind == "file"
    assert block.text == (ROOT / path).read_text()


def test_examples_of_components_are_short_and_quoted():
    quoted = {block.marker.removeprefix("file: ") for block in QUOTES}
    for name in ("token_match", "random_network"):
        assert {f"docs/examples/{name}.py", f"docs/examples/{name}.yaml"} <= quoted
        assert len((ROOT / "docs" / "examples" / f"{name}.py").read_text().splitlines()) < 40


@pytest.mark.parametrize("block", YAML, ids=lambda block: f"{block.page}:{block.line}")
def test_yaml_names_components_and_arguments_that_exist(block, tmp_path, monkeypatch):
    for python in blocks(block.page, "python"):  # a component that the page itself shows
        if (name := re.search(r"^class (\w+)", python.text, re.M)) and not python.marker:
            (tmp_path / f"{name[1].lower()}.py").write_text(python.text)
    monkeypatch.syspath_prepend(tmp_path)
    validate_config(OmegaConf.create(block.text))


@pytest.mark.parametrize("page", PAGES)
def test_names_of_ours_can_be_imported(page):
    for name in re.findall(r"\bcomponents(?:\.\w+)+", read(page)):
        module, attribute = name, None
        while (found := _module(module)) is None:
            module, _, attribute = module.rpartition(".")
        assert attribute is None or hasattr(found, attribute), name


@functools.cache
def _module(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_name_what_is_there(page):
    for text, target in LINK.findall(read(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )
        if path.endswith(".py") and re.fullmatch(r"`\w+(\.\w+)?`", text) and not text.endswith(".py`"):
            for name in text.strip("`").split("."):
                assert re.search(rf"\b(class|def) {name}\b", file.read_text()), f"{text} is not in {path}"


KEY = re.compile(r"^~?([a-z_]+(?:\.[a-z_]+)+)(?:[:=].*)?$", re.DOTALL)


@functools.cache
def options():
    """All options of documented components, and of the optimizers they stand beside."""
    names = {parameter for name in SECTIONS for parameter in inspect.signature(component(name)).parameters}
    names |= set(inspect.signature(torch.optim.AdamW).parameters) | {"_component_"}
    return names | {*schema.REQUIRED, *schema.OPTIONAL, *schema.VALIDATION_REQUIRED, *schema.VALIDATION_OPTIONAL}


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_a_config_exist(page):
    """Of texts such as ``generator.num_samples`` or ``loss.ce_coef=0``, each part is a key of some component."""
    for text in re.findall(r"`([^`\n]+)`", prose(page)):
        for word in re.split(r"[ ,]+(?=[~a-z_.]+=)", text):
            found = KEY.match(word)
            if found and found[1].split(".")[0] in {*schema.REQUIRED, *schema.OPTIONAL}:
                parts = found[1].split(".")
                if parts[-1] in ("json", "md", "py", "safetensors", "yaml"):
                    continue
                assert set(parts) <= options(), word


def test_our_column_of_the_migration_tables_holds_keys():
    for cells in rows(read("docs/migration.md"), 3):
        for key in re.findall(r"`([a-z_.]+)(?:[`:=])", cells[1]):
            assert set(key.split(".")) <= options() | {"components"}, key


@functools.cache
def messages():
    """Every text in the code, as its parts between what is filled in."""
    found = []
    for file in [*ROOT.glob("components/**/*.py"), *ROOT.glob("recipes/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


FAQ = [cells[0][1:-1].replace("\\|", "|") for cells in rows(read("docs/faq.md"), 2)]


@pytest.mark.parametrize("message", FAQ)
def test_a_message_is_one_that_the_code_has(message):
    """Its parts between … stand in one text of the code, in their order."""
    pattern = re.compile(
        ".*?".join(re.escape(part.strip(" ;")) for part in message.split("…") if part.strip(" ;")), re.S
    )
    assert any(pattern.search(text) for text in messages())
    assert len(max(message.split("…"), key=len)) > 8, "too little to recognise it by"


def test_there_are_messages():
    assert len(FAQ) > 25


def test_a_message_that_nobody_says_is_found_out():
    with pytest.raises(AssertionError):
        test_a_message_is_one_that_the_code_has("… is not empty; this was never said")
