"""``ebft estimate`` against the peak memory that runs have measured.

    python -m benchmarks.estimates outputs/quickstart outputs/study/translation/ebft_003/lr_3e-05_seed_1

Each run's own ``config.yaml`` is estimated and compared with the largest ``peak_memory_gib`` of its ``metrics.jsonl``. For runs
of one process on a CPU, where that is the resident memory of the process.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from components.estimate import GIB
from components.preview import memory_of, preview
from components.training import load_config, read_metrics


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    table = Table()
    for heading in ("run", "measured GiB", "estimated GiB", "estimated / measured"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for run in parser.parse_args().runs:
        measured = max(row["peak_memory_gib"] for row in read_metrics(run))
        with preview(load_config(run / "config.yaml")) as found:
            estimated = memory_of(found).peak / GIB
        table.add_row(str(run), f"{measured:.2f}", f"{estimated:.2f}", f"{estimated / measured:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
