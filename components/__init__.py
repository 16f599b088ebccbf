"""The parts of energy-based fine-tuning, one folder per stage of the pipeline (CONTRIBUTING.md has the map).

This file imports none of them. It only makes sure, before anything here can import torchtune, that the installed
libraries are the ones this version was written for: torchtune with a newer torchao fails on import with a message that
names neither.
"""

import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

__all__ = ["SUPPORTED", "check_versions"]

__version__ = "0.1.0"

# As in pyproject.toml, which gives the reasons. pip enforces it when installing; a later install can break it.
SUPPORTED = {"torch": ">=2.13,<2.14", "torchtune": "==0.6.1", "torchao": "==0.15.0"}


def check_versions(installed: Mapping[str, str | None]) -> None:
    """Compare versions with the supported ones; a local part such as ``+cpu`` does not count.

    Args:
        installed: version of each distribution in ``SUPPORTED``, None where it is missing.

    Raises:
        ImportError: one differs. The sentence says what was found and the command that repairs it.
    """
    wrong = {name: installed[name] for name, wanted in SUPPORTED.items() if not _fits(installed[name], wanted)}
    if wrong:
        needed = ", ".join(f"{name}{wanted}" for name, wanted in SUPPORTED.items())
        found = ", ".join(f"{name} {given}" if given else f"no {name}" for name, given in wrong.items())
        command = " ".join(f'"{name}{SUPPORTED[name]}"' for name in wrong)
        raise ImportError(f"torchtune-ebft needs {needed}, found {found}; run: pip install {command}")


def _fits(given: str | None, wanted: str) -> bool:
    return given is not None and SpecifierSet(wanted).contains(given)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _worth_reading(record: logging.LogRecord) -> bool:
    """False for torchao's note, at every start, that its C++ kernels are for another torch: nothing here needs them."""
    return not record.getMessage().startswith("Skipping import of cpp extensions due to incompatible torch version")


check_versions({name: _installed(name) for name in SUPPORTED})
logging.getLogger("torchao").addFilter(_worth_reading)
# torchtune's norms compute in float32 whatever dtype the weights are in; torch says so once in every bf16 run.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
# The version of torchao is pinned, so what a later one drops concerns no user; it says so for every matrix.
warnings.filterwarnings("ignore", "Config Deprecation: version 1 of ")
