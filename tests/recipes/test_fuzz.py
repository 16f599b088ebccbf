"""A thousand slips, one at a time, in valid configs: each is refused by a sentence that names the place, or makes another valid
config. Seeded, so that a failure can be looked at again."""

import copy
import random

import pytest
from omegaconf import OmegaConf

from components.preview import preview
from components.training import load_config
from tests.recipes.test_ebft import QUICKSTART, material, overrides  # noqa: F401

LORA = QUICKSTART.parent / "smollm2_135m" / "lora.yaml"
SLIPS = 1000
PARTS = 10  # tests that share them


def leaves(node, path=()):
    """Paths of all that is no mapping, in mappings within mappings."""
    for key, value in node.items():
        if isinstance(value, dict):
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


def typo(config, rng):
    """A key misspelt by one letter."""
    *parent, key = rng.choice(list(leaves(config)))
    index = rng.randrange(len(key))
    wrong = key[:index] + rng.choice(["", key[index] * 2, "q"]) + key[index + 1 :]
    if wrong in at(config, parent) or wrong == key:
        return None
    holder = at(config, parent)
    holder[wrong] = holder.pop(key)
    return (key, wrong), "refused"


def removed(config, rng):
    """A key left out, at any depth."""
    *parent, key = rng.choice(list(leaves(config)))
    del at(config, parent)[key]
    return (key, *parent), "may pass"


def wrong_type(config, rng):
    """A value of a kind that its key cannot have."""
    path = rng.choice([path for path in leaves(config) if path[-1] != "_component_"])
    old = at(config, path)
    kinds = {"number": [3, 0.5], "text": ["some text"], "list": [["a", "b"]], "mapping": [{"a": 1}], "switch": [True]}
    kind = (
        "switch"
        if isinstance(old, bool)
        else "number"
        if isinstance(old, int | float)
        else "list"
        if isinstance(old, list)
        else "text"
    )
    if kind == "text" and isinstance(old, str) and "${" in old:
        return None
    wrong = rng.choice([value for other, values in kinds.items() if other != kind for value in values])
    at(config, path[:-1])[path[-1]] = wrong
    return path, "may pass" if path[-1] in ("metric_logger", "resume_with_changes") else "refused"


def wrong_place(config, rng):
    """A key moved into another mapping, which has none of that name."""
    *parent, key = rng.choice([path for path in leaves(config) if path[-1] != "_component_"])
    target = rng.choice([path for path in mappings(config) if list(path) != parent and key not in at(config, path)])
    at(config, target)[key] = at(config, parent).pop(key)
    return (key,), "may pass"


def out_of_range(config, rng):
    """A number that means nothing there."""
    numbers = [path for path in leaves(config) if type(at(config, path)) in (int, float)]
    path = rng.choice(numbers)
    at(config, path[:-1])[path[-1]] = rng.choice([-1, -0.5, float("nan"), float("inf")])
    return path, "refused"


@pytest.mark.parametrize("part", range(PARTS))
def test_a_slip_is_refused_by_name_or_harmless(part, overrides, tmp_path):  # noqa: F811
    rng = random.Random(part)
    configs = [OmegaConf.to_container(load_config(path, overrides)) for path in (QUICKSTART, LORA)]
    done, wrong = 0, []
    while done < SLIPS // PARTS:
        config = copy.deepcopy(rng.choice(configs))
        slip = rng.choice([typo, removed, wrong_type, wrong_place, out_of_range])
        found = slip(config, rng)
        if found is None:
            continue
        (names, expected), done = found, done + 1
        try:
            with preview(OmegaConf.create(config)):
                outcome = "passed"
        except ValueError as error:
            outcome = str(error)
        except Exception as error:
            wrong.append((slip.__name__, names, f"{type(error).__name__}: {error}"))
            continue
        if outcome == "passed":
            if expected == "refused":
                wrong.append((slip.__name__, names, "passed"))
        elif not any(str(name) in outcome for name in names):
            wrong.append((slip.__name__, names, outcome))
        assert not (tmp_path / "run").exists()
    assert not wrong, "\n".join(map(str, wrong))
