"""The console command ``ebft``: torchtune's own command line, with our recipes and configs among those it knows.

``ebft run ebft --config quickstart`` is ``tune run RECIPE --config FILE`` for the recipe and the config of these names, from
any folder. What is not about names (processes, overrides, downloads) is torchtune's.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from torch.distributed.elastic.multiprocessing.api import SignalException
from torchtune import _recipe_registry as registry
from torchtune._cli.cat import Cat
from torchtune._cli.cp import Copy
from torchtune._cli.download import Download
from torchtune._cli.ls import List
from torchtune._cli.run import Run

import components
from components.evaluation import check_evaluation
from components.preview import estimate as estimate_table
from components.preview import preview, show
from components.report import report_page, report_plots, rollouts_page, rollouts_table
from components.training import load_config, naming_file, written_out

RECIPES = ("ebft", "evaluate")
_OUTPUT_DIR = re.compile(r"^output_dir: *[^ ?]", re.MULTILINE)


def shipped(kind: str) -> Path:
    """The folder ``recipes`` or ``configs``: of the checkout, or of the installed package, which carries copies of both."""
    package = Path(components.__file__).parent
    checkout = package.parent / kind
    # torchtune installs a package `recipes` beside ours, which has no ebft.py.
    return checkout if (checkout.parent / "recipes" / "ebft.py").is_file() else package / f"_{kind}"


def config_names(recipe: str) -> dict[str, Path]:
    """The configs of a recipe by name, which is their path without the suffix. Those of ``evaluate`` are called so.

    What says no ``output_dir`` is no run: it is the ``base`` of others.
    """
    folder = shipped("configs")
    files = [path for path in sorted(folder.rglob("*.yaml")) if _OUTPUT_DIR.search(path.read_text(encoding="utf-8"))]
    names = {str(path.relative_to(folder).with_suffix("")): path for path in files}
    return {name: path for name, path in names.items() if ("evaluate" in path.stem) == (recipe == "evaluate")}


def known_configs() -> dict[str, Path]:
    """The configs of all recipes by name."""
    return {config: path for recipe in RECIPES for config, path in config_names(recipe).items()}


def register() -> None:
    """Make our recipes and configs known to torchtune, before its own."""
    known = {recipe.name for recipe in registry.get_all_recipes()}
    ours = [
        registry.Recipe(
            name=name,
            file_path=str(shipped("recipes") / f"{name}.py"),
            configs=[registry.Config(name=config, file_path=str(path)) for config, path in config_names(name).items()],
            supports_distributed=True,
        )
        for name in RECIPES
        if name not in known
    ]
    registry._ALL_RECIPES[:0] = ours


def find_config(name: str) -> str:
    """The file of a config that is given by name or by path.

    Raises:
        ValueError: it is neither.
    """
    path = known_configs().get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"there is no config or file '{name}'; `ebft ls` lists the configs")
    return str(path)


def of_whole_configs(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """torchtune's ``cp`` or ``cat``, which know no ``base``: they get the config written out."""

    def run(args: argparse.Namespace) -> None:
        path = known_configs().get(getattr(args, "config_name", None) or args.file)
        with tempfile.TemporaryDirectory() as folder:
            for config in [config for recipe in registry.get_all_recipes() for config in recipe.configs]:
                if path is not None and config.file_path == str(path):
                    config.file_path = str(Path(folder, path.name))
                    Path(config.file_path).write_text(written_out(path), encoding="utf-8")
            command(args)

    return run


def until_a_signal(command: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """torchtune's ``run``, ended by a signal as commands are, without a traceback: the run has said how it goes on."""

    def run(args: argparse.Namespace) -> None:
        try:
            command(args)
        except SignalException as stopped:
            sys.exit(128 + stopped.sigval)

    return run


def validate(args: argparse.Namespace) -> None:
    """Build every part of each config without weights, and show the first row with its anchors."""
    for name in args.config:
        cfg = load_config(find_config(name), args.set)
        if "measures" in cfg:
            with naming_file(cfg):
                check_evaluation(cfg)
            print(f"{name}: its keys and components are valid; checkpoints and data are looked at when it runs")
            continue
        with preview(cfg) as found:
            Console().print(show(found))
        print(f"{name}: valid" + (", as far as it could be looked at" if found.missing else ""))


def estimate(args: argparse.Namespace) -> None:
    """Print arithmetic and memory of a config."""
    with preview(load_config(find_config(args.config), args.set)) as found:
        Console().print(estimate_table(found, ranks=args.ranks))


def report(args: argparse.Namespace) -> None:
    """Write one HTML file about one run or several: curves, changes, time, differences between configs."""
    path = report_page(args.run, args.out or Path(args.run[0], "report.html"))
    plots = report_plots(args.run, path.with_suffix("")) if args.png else []
    print(path, *plots, sep="\n")


def rollouts(args: argparse.Namespace) -> None:
    """Show what a run sampled: the newest kept step here, all of them in one HTML file."""
    Console().print(rollouts_table(args.run, step=args.step))
    print(rollouts_page(args.run, args.out))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """torchtune's commands that make sense for our recipes."""
    parser = argparse.ArgumentParser(prog="ebft", description="Energy-based fine-tuning on torchtune.")
    parser.set_defaults(func=lambda args: parser.print_help())
    commands = parser.add_subparsers(title="commands")
    for command in (List, Run, Copy, Cat, Download):
        command.create(commands)
    for name in ("cp", "cat"):
        commands.choices[name].set_defaults(func=of_whole_configs(commands.choices[name].get_default("func")))
    commands.choices["run"].set_defaults(func=until_a_signal(commands.choices["run"].get_default("func")))
    for name, function, many in (("validate", validate, "+"), ("estimate", estimate, None)):
        own = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        own.add_argument("config", nargs=many, help="name or file")
        own.add_argument("--set", nargs="+", default=[], metavar="key=value", help="overrides, as after `ebft run`")
        own.set_defaults(func=function)
    commands.choices["estimate"].add_argument(
        "--ranks", type=_count, default=1, help="processes that share the weights"
    )
    for name, function in (("report", report), ("rollouts", rollouts)):
        own = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        own.add_argument("run", nargs="+" if name == "report" else None, help="output_dir of a run")
        own.add_argument("--out", help="the file to write; by default in the (first) run's folder")
        own.set_defaults(func=function)
    commands.choices["report"].add_argument(
        "--png", action="store_true", help="also write the curves as PNG files, into a folder named as the page"
    )
    commands.choices["rollouts"].add_argument("--step", type=int, help="which kept step the table shows")
    for name, each in commands.choices.items():
        each.prog = f"ebft {name}"
        each.usage, each.epilog = (text and text.replace("tune ", "ebft ") for text in (each.usage, each.epilog))
    return parser


def main() -> None:
    """The command line."""
    register()
    args = build_parser().parse_args()
    try:
        args.func(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
