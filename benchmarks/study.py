"""Runs the study of docs/study.md, in pieces: every run goes on where it was stopped, and what is done is not done again.

    python -m benchmarks.study grid translation --minutes 100    # half of every arm at every learning rate, seed 1
    python -m benchmarks.study choose translation                # which of them was best, to be written into its YAML
    python -m benchmarks.study final translation                 # every arm as its YAML says: the other half, further seeds
    python -m benchmarks.study ablations --minutes 100           # one change at a time
    python -m benchmarks.study prune                             # checkpoints that are no longer needed

A run is one `tune run` command, on a core of its own. Beside its folder stand ``.log``, its output, and ``.json``: the
seconds of processor time that its pieces took, with start and validation.
"""

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.evaluation import load_validations
from components.training import load_config, read_metrics

CONFIGS = Path("configs/study")
TASKS = ("translation", "code", "coding")
LEARNING_RATES = ("1e-05", "3e-05", "0.0001")
SEEDS = (1, 2)
# Configs that are no runs.
PARTS = ("task", "measures", "evaluate")
# Chosen by what the arm optimises, where validation measures it.
CHOSEN_BY = {"sft": "cross_entropy", "sft_long": "cross_entropy"}


@dataclass(frozen=True)
class Run:
    """A config of the study with what differs from it."""

    config: Path
    overrides: tuple[str, ...] = ()

    @property
    def output_dir(self) -> Path:
        """Where the config says; runs that are the same are in the same place."""
        return Path(load_config(self.config, self.overrides).output_dir)

    @property
    def record(self) -> Path:
        """Of the processor time. The name of the folder may end in what looks like a suffix."""
        return self.output_dir.with_name(self.output_dir.name + ".json")

    def finished(self) -> bool:
        """Whether all its steps were taken, and saved."""
        return self.record.exists() and json.loads(self.record.read_text())["steps"] >= self.max_steps

    @property
    def max_steps(self) -> int:
        """Of the config."""
        return load_config(self.config, self.overrides).max_steps


def grid(tasks: Sequence[str]) -> list[Run]:
    """The first half of every arm but the long one at every learning rate; schedules do not depend on a run's length."""
    runs = []
    for task in tasks:
        for arm in arms(task):
            if arm.stem != "sft_long":
                steps = load_config(arm).max_steps // 2
                runs += [Run(arm, (f"optimizer.lr={lr}", f"max_steps={steps}")) for lr in LEARNING_RATES]
    return runs


def final(tasks: Sequence[str]) -> list[Run]:
    """Every arm as its YAML says, with every seed."""
    return [Run(arm, (f"seed={seed}",)) for task in tasks for seed in SEEDS for arm in arms(task)]


def ablations(tasks: Sequence[str]) -> list[Run]:
    """All of ``configs/study/ablations``, with every seed."""
    return [
        Run(config, (f"seed={seed}",))
        for seed in SEEDS
        for config in sorted((CONFIGS / "ablations").glob("*.yaml"))
        if config.stem not in PARTS
    ]


def arms(task: str) -> list[Path]:
    """The configs of a task that are runs."""
    return sorted(path for path in (CONFIGS / task).glob("*.yaml") if path.stem not in PARTS)


def work(runs: Sequence[Run], cores: Sequence[int], minutes: float) -> bool:
    """Run what is not finished, one on each core, and stop after ``minutes``; whether everything is done."""
    waiting: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if not run.finished():
            waiting.put(run)
    print(f"{len(runs)} runs, {waiting.qsize()} of them not finished", flush=True)
    deadline = time.monotonic() + 60 * minutes
    threads = [threading.Thread(target=_work, args=(waiting, core, deadline)) for core in cores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return all(run.finished() for run in runs)


def _work(waiting: "queue.SimpleQueue[Run]", core: int, deadline: float) -> None:
    while time.monotonic() < deadline:
        try:
            run = waiting.get_nowait()
        except queue.Empty:
            return
        execute(run, core, deadline)


def execute(run: Run, core: int, deadline: float) -> None:
    """Run it on ``core`` until it ends, or tell it to save and stop at ``deadline``; note the processor time."""
    run.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run.output_dir.with_name(run.output_dir.name + ".log"), "a") as log:
        process = subprocess.Popen(
            [
                *("taskset", "--cpu-list", str(core)),
                *(str(Path(sys.executable).with_name("tune")), "run", "--nproc_per_node", "1", "recipes/ebft.py"),
                *("--config", str(run.config), *run.overrides),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        timer = threading.Timer(deadline - time.monotonic(), process.send_signal, (signal.SIGTERM,))
        timer.start()
        # Of this process and those it waited for alone, which resource.getrusage could not tell.
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
    code = os.waitstatus_to_exitcode(status)
    steps = read_metrics(run.output_dir)
    done = steps[-1]["step"] if steps else 0
    pieces = json.loads(run.record.read_text())["pieces"] if run.record.exists() else []
    pieces.append(round(usage.ru_utime + usage.ru_stime, 1))
    run.record.write_text(json.dumps({"pieces": pieces, "steps": done if code == 0 else 0}) + "\n")
    print(f"{run.output_dir}: exit code {code} at step {done}, {pieces[-1]} s of processor time", flush=True)


def choose(tasks: Sequence[str]) -> None:
    """Print, for every arm and learning rate, what validation says after the last step."""
    for task in tasks:
        for arm in arms(task):
            for run in (run for run in grid([task]) if run.config == arm and run.finished()):
                validations = list(load_validations(run.output_dir).values())
                before, metrics = validations[0], validations[-1]
                changes = []
                for name in dict.fromkeys(
                    [CHOSEN_BY.get(arm.stem, "feature_matching_loss"), "cross_entropy", "alignment"]
                ):
                    change = metrics[name].change_since(before[name])
                    changes.append(f"{name} {change.mean():+.4f} +- {change.standard_error():.4f}")
                rewards = [row["reward"] for row in read_metrics(run.output_dir) if "reward" in row]
                if rewards:
                    third = max(1, len(rewards) // 3)
                    first, last = (sum(part) / third for part in (rewards[:third], rewards[-third:]))
                    changes.append(f"reward {first:.4f} -> {last:.4f}")
                print(f"{run.output_dir}: {', '.join(changes)}")


def prune() -> None:
    """Remove the checkpoints of runs that are neither final nor ablations; logs and validations stay."""
    kept = {run.output_dir for run in final(TASKS) + ablations(TASKS)}
    for run in grid(TASKS):
        if run.output_dir not in kept and run.finished():
            for checkpoint in run.output_dir.glob("step_*"):
                shutil.rmtree(checkpoint)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "choose", "final", "ablations", "prune"])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--minutes", type=float, default=110, help="until everything is told to save and stop")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="a run at a time on each")
    args = parser.parse_args()
    tasks = args.tasks or TASKS
    if unknown := set(tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(unknown)}; choose of {', '.join(TASKS)}")
    if args.what == "choose":
        choose(tasks)
    elif args.what == "prune":
        prune()
    else:
        runs = {"grid": grid, "final": final, "ablations": ablations}[args.what](tasks)
        return 0 if work(runs, args.cores, args.minutes) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
