"""The shape of the project itself: what imports what, what is packaged and declared, which versions it runs with."""

import ast
import logging
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from setuptools import find_packages

import components
from components.types import Batch, Features, Rollouts

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Lowest first: each may import what stands before it.
ORDER = [
    "types",
    "schedules",
    "data",
    "blocks",
    "models",
    "rollouts",
    "features",
    "rewards",
    "advantages",
    "losses",
    "estimate",
    "training",
    "evaluation",
    "report",
    "prepare",
    "preview",
    "cli",
]

COMPONENTS = sorted((ROOT / "components").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in COMPONENTS + RECIPES
}


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, at whatever depth; a module of ours by its own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def stage(module: str) -> str | None:
    """``components.models.policy`` -> ``models``; None for ``components`` itself and for other packages."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] or None if package == "components" else None


def test_every_file_has_a_place_in_the_order():
    assert {stage(module) for module in MODULES} - {None} <= set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_stands_below_it(module):
    imported = set(imports_of(MODULES[module]))
    assert not any(name.split(".")[0] == "recipes" for name in imported)  # what two recipes share is a component
    if module.startswith("components."):
        below = {*ORDER[: ORDER.index(stage(module)) + 1], None}
        assert {stage(name) for name in imported} <= below


def test_no_imports_go_in_a_circle():
    graph = {module: [name for name in imports_of(path) if name in MODULES] for module, path in MODULES.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_every_library_imported_is_declared():
    extras = PYPROJECT["project"]["optional-dependencies"]
    lines = PYPROJECT["project"]["dependencies"] + [line for name in extras if name != "dev" for line in extras[name]]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    imported = {name.split(".")[0] for path in MODULES.values() for name in imports_of(path)}
    for name in imported - sys.stdlib_module_names - {"components", "recipes"}:
        candidates = {canonicalize_name(found) for found in distributions.get(name, [name])}
        assert candidates & declared, f"{name} is not in pyproject.toml"


def test_only_components_are_packaged_and_all_of_them():
    # A package named `recipes` of ours would shadow torchtune's.
    packaged = set(find_packages(str(ROOT), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]))
    assert packaged == {".".join(path.parent.relative_to(ROOT).parts) for path in COMPONENTS}


@pytest.mark.parametrize(("paths", "limit"), [(RECIPES, 400), (COMPONENTS, 350)], ids=["recipes", "components"])
def test_files_are_short_enough_to_be_read(paths, limit):
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in paths}
    assert not {path: length for path, length in lengths.items() if length >= limit}


def test_versions_checked_on_import_are_those_of_pyproject():
    requirements = map(Requirement, PYPROJECT["project"]["dependencies"])
    declared = {requirement.name: requirement.specifier for requirement in requirements}
    assert {name: SpecifierSet(wanted) for name, wanted in components.SUPPORTED.items()} == {
        name: declared[name] for name in components.SUPPORTED
    }


SUPPORTED_BUILD = {"torch": "2.13.0+cpu", "torchtune": "0.6.1", "torchao": "0.15.0+cu130"}


def test_supported_versions_pass_in_any_build():
    components.check_versions(SUPPORTED_BUILD)


@pytest.mark.parametrize(
    ("change", "found", "command"),
    [
        ({"torchao": "0.17.0"}, "found torchao 0.17.0;", 'pip install "torchao==0.15.0"'),
        ({"torch": "2.12.1+cu130"}, "found torch 2.12.1+cu130;", 'pip install "torch>=2.13,<2.14"'),
        ({"torch": "2.14.0"}, "found torch 2.14.0;", 'pip install "torch>=2.13,<2.14"'),
        (
            {"torchtune": None, "torchao": "0.16.0"},
            "found no torchtune, torchao 0.16.0;",
            'pip install "torchtune==0.6.1" "torchao==0.15.0"',
        ),
    ],
)
def test_other_versions_are_refused_with_what_was_found_and_the_command(change, found, command):
    with pytest.raises(ImportError) as error:
        components.check_versions(SUPPORTED_BUILD | change)
    assert found in str(error.value)
    assert str(error.value).endswith(command)


def test_the_check_runs_before_torch_or_torchtune_is_imported():
    code = "import components, sys; sys.exit(bool({'torch', 'torchtune', 'torchao'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Skipping import of cpp extensions due to incompatible torch version 2.13.0 for torchao 0.15.0", False),
        ("anything else that torchao says", True),
    ],
)
def test_torchao_is_silent_only_about_its_kernels(message, shown):
    record = logging.LogRecord("torchao", logging.WARNING, __file__, 1, message, None, None)
    assert bool(logging.getLogger("torchao").filter(record)) is shown


def test_the_component_in_contributing_works():
    source = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert source
    exec(source[1], namespace := {})
    # One sequence, two samples, two blocks of four tokens. The first block's samples stop after 1 and 4 tokens; the
    # second block does not count.
    mask = torch.tensor([[[[1, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]], dtype=torch.bool)
    tokens = torch.zeros(1, 2, 2, 4, dtype=torch.long)
    row = torch.zeros(1, 9, dtype=torch.long)
    batch = Batch(tokens=row, doc_ids=row, target_mask=row == 0)
    rollouts = Rollouts(tokens=tokens, mask=mask, anchors=torch.tensor([[1, 5]]), logprobs=tokens.float())
    features = Features(
        rollout=torch.zeros(1, 2, 2, 3), target=torch.zeros(1, 2, 3), mask=torch.tensor([[True, False]])
    )
    rewards = namespace["Brevity"](coef=2.0)(batch, rollouts, features)
    assert rewards.total.tolist() == [[[1.5, 0.0], [0.0, 0.0]]]
    assert rewards.metrics == {"brevity/unused": 0.375}
