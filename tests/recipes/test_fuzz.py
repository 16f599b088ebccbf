"""A thousand slips, one at a time, in valid configs: each is refused by a sentence that names file and place, or makes another
config, which is followed. Seeded, so that a failure can be looked at again."""

import copy
import importlib
import inspect
import random
import types

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from components.models import parse_dtype
from components.preview import preview
from components.training import load_config, stop
from recipes.ebft import EBFTRecipe
from tests.recipes.test_completions import completions, rlvr  # noqa: F401
from tests.recipes.test_ebft import QUICKSTART, material, overrides  # noqa: F401

LORA = QUICKSTART.parent / "smollm2_135m" / "lora.yaml"
SLIPS = 1002
RUNS = 12  # of the slips that passed, for each of three configs


def leaves(node, path=()):
    """Paths of all that is neither mapping nor list, in mappings and lists at any depth."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def mappings(node, path=()):
    yield path
    for key, value in node.items():
        if isinstance(value, dict):
            yield from mappings(value, (*path, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def dotted(path):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def keys(config):
    """Paths of values that have a name: of a list as a whole, not of its items."""
    return list(
        dict.fromkeys(
            path[: next((i for i, key in enumerate(path) if isinstance(key, int)), len(path))]
            for path in leaves(config)
        )
    )


def typo(config, rng):
    """A key misspelt by one letter."""
    *parent, key = rng.choice(keys(config))
    index = rng.randrange(len(key))
    wrong = key[:index] + rng.choice(["", key[index] * 2, "q"]) + key[index + 1 :]
    if wrong in at(config, parent) or wrong == key:
        return None
    holder = at(config, parent)
    holder[wrong] = holder.pop(key)
    return (dotted([*parent, wrong]), key), "refused"


def removed(config, rng):
    """A key left out, at any depth, or an item of a list."""
    *parent, key = rng.choice([*keys(config), *(path for path in leaves(config) if isinstance(path[-1], int))])
    del at(config, parent)[key]
    return (key, *parent), "may pass"


def wrong_type(config, rng):
    """A value of a kind that its key cannot have."""
    path = rng.choice([path for path in leaves(config) if path[-1] != "_component_"])
    old = at(config, path)
    kinds = {"number": [3, 0.5], "text": ["some text"], "list": [["a", "b"]], "mapping": [{"a": 1}], "switch": [True]}
    kind = "switch" if isinstance(old, bool) else "number" if isinstance(old, int | float) else "text"
    if kind == "text" and "${" in old:
        return None
    wrong = rng.choice([value for other, values in kinds.items() if other != kind for value in values])
    at(config, path[:-1])[path[-1]] = wrong
    return path, "may pass" if path[0] in ("metric_logger", "resume_with_changes") else "refused"


def wrong_place(config, rng):
    """A key moved into another mapping, which has none of that name."""
    *parent, key = rng.choice([path for path in keys(config) if path[-1] != "_component_"])
    target = rng.choice([path for path in mappings(config) if list(path) != parent and key not in at(config, path)])
    at(config, target)[key] = at(config, parent).pop(key)
    return (key,), "may pass"


def numbers(config):
    return [path for path in leaves(config) if type(at(config, path)) in (int, float)]


def out_of_range(config, rng):
    """A number that means nothing there."""
    path = rng.choice(numbers(config))
    at(config, path[:-1])[path[-1]] = rng.choice([-1, -0.5, float("nan"), float("inf")])
    return path, "refused"


def too_large(config, rng):
    """A number of another size; many are still what somebody might want, if not here."""
    path = rng.choice(numbers(config))
    at(config, path[:-1])[path[-1]] *= 1000
    return path, "may pass, not run"


def described(value, known=None):
    """Everything a value is made of, as far as it can be told apart: classes, settings, shapes; not the numbers in tensors."""
    known = set() if known is None else known
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.requires_grad
    if isinstance(value, dict):
        return {str(key): described(inner, known) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [described(inner, known) for inner in value]
    if isinstance(value, types.FunctionType):
        return value.__qualname__, described([cell.cell_contents for cell in value.__closure__ or ()], known)
    if not hasattr(value, "__dict__"):
        return value if isinstance(value, str | int | float | None) else type(value).__name__
    if id(value) in known or isinstance(value, type | types.MethodType | types.ModuleType | DictConfig):
        return type(value).__name__
    known.add(id(value))
    return type(value).__name__, described(vars(value), known)


def one_step(config):
    """What the run of a config is made of, once it has taken its first step."""
    recipe = EBFTRecipe(config)
    try:
        recipe.setup()
        made = described({name: part for name, part in vars(recipe).items() if name not in ("cfg", "output_dir")})
        recipe.max_steps = 1
        recipe.train()
    finally:
        stop()
    return made


def is_default(config, path):
    """Whether what stands there is what its component takes if nothing does."""
    module, _, name = at(config, path[:-1])["_component_"].rpartition(".")
    default = inspect.signature(getattr(importlib.import_module(module), name)).parameters[path[-1]].default
    value = parse_dtype(at(config, path)) if path[-1] == "dtype" else at(config, path)
    return value == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize("start", range(3))
def test_a_slip_is_refused_by_name_or_followed(start, overrides, completions, tmp_path):  # noqa: F811
    verifier = "{_component_: tests.recipes.test_completions.ShareOfE}"
    original = load_config(
        *[(QUICKSTART, overrides), (LORA, overrides), (QUICKSTART, rlvr(completions, verifier))][start]
    )
    config, rng, file = OmegaConf.to_container(original), random.Random(start), tmp_path / "slip.yaml"
    wrong, done, passed = [], 0, {}
    while done < SLIPS // 3:
        changed = copy.deepcopy(config)
        slip = rng.choice([typo, removed, wrong_type, wrong_place, out_of_range, too_large])
        found = slip(changed, rng)
        if found is None:
            continue
        (names, expected), done = found, done + 1
        file.write_text(OmegaConf.to_yaml(OmegaConf.create(changed)))
        try:
            with preview(load_config(file)):
                outcome = None
        except ValueError as error:
            outcome = str(error)
        except Exception as error:
            outcome = f"a traceback, {type(error).__name__}: {error}"
        if outcome is None:
            if expected == "refused":
                wrong.append((slip.__name__, names, "passed"))
            elif slip is not too_large:  # a run of a thousand samples ends some day
                passed[names] = changed
        elif str(file) not in outcome or not (all if slip is typo else any)(str(name) in outcome for name in names):
            wrong.append((slip.__name__, names, outcome))
        assert not (tmp_path / "run").exists()
    assert not wrong, "\n".join(map(str, wrong))

    made, plain = one_step(original), OmegaConf.to_container(original, resolve=True)
    for (key, *parent), changed in rng.sample(list(passed.items()), min(RUNS, len(passed))):
        name = "-".join(map(str, (*parent, key)))
        again = one_step(OmegaConf.create(changed | {"output_dir": str(tmp_path / name)}))
        if parent:
            assert (again == made) == (isinstance(key, str) and is_default(plain, (*parent, key))), name
