"""Kept rollouts for people to read: a page in which every anchor of a text can be opened, and a table for the terminal."""

import re
from pathlib import Path

from rich.table import Table
from rich.text import Text

from components.report.page import write_page
from components.training import KeptSample, KeptText, load_rollouts


def rollouts_page(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the rollouts of a run as one HTML file that needs nothing else.

    Args:
        run_dir: a run that kept rollouts (``components.training.save_rollouts``).
        out: the file; ``run_dir/rollouts.html`` by default.

    Raises:
        ValueError: there are none.
    """
    kept = _load(run_dir)
    name = Path(run_dir).resolve().name
    data = {"name": name, "steps": [{"step": step, "texts": texts} for step, texts in kept.items()]}
    return write_page(Path(out or Path(run_dir, "rollouts.html")), "rollouts", title=f"Rollouts of {name}", data=data)


def rollouts_table(run_dir: str | Path, *, step: int | None = None, anchors: int = 8) -> Table:
    """The first text kept at a step, as a table: its true continuations and samples, the best rewarded first.

    Args:
        run_dir: a run that kept rollouts.
        step: which; the newest by default.
        anchors: how many of the anchors that count are shown, evenly spread over the text.

    Raises:
        ValueError: there are none, or none of ``step``.
    """
    kept = _load(run_dir)
    step = max(kept) if step is None else step
    if step not in kept:
        raise ValueError(f"'{run_dir}' kept no rollouts of step {step}; choose from {', '.join(map(str, kept))}")
    text = kept[step][0]
    counted = [block for block in text["blocks"] if block["counts"]]
    table = Table(title=f"Rollouts of step {step}, {min(anchors, len(counted))} of {len(counted)} anchors")
    table.add_column("token", justify="right")
    table.add_column("continuation", overflow="fold", ratio=1)
    for heading in ("reward", "alignment", "advantage", "log-prob"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("copy of")
    shown = min(anchors, len(counted))
    for block in (counted[index * len(counted) // shown] for index in range(shown)):
        before = "".join(text["tokens"][: block["anchor"]])[-40:]
        table.add_row(
            str(block["anchor"]),
            Text.assemble((_line(before), "dim"), (_line("".join(block["truth"])), "bold underline")),
        )
        for number, sample in sorted(enumerate(block["samples"]), key=lambda each: -(_reward(each[1]) or 0.0)):
            copied = sample["copy_of"]
            table.add_row(
                f"sample {number + 1}",
                _tinted(sample),
                _shown(_reward(sample)),
                _shown(sample["pointwise"]),
                Text(
                    _shown(sample["advantage"], sign="+"), style="blue" if (sample["advantage"] or 0) > 0 else "yellow"
                ),
                _shown(_mean_logprob(sample)),
                "" if copied is None else f"sample {copied + 1}",
            )
        table.add_section()
    return table


def _load(run_dir: str | Path) -> dict[int, list[KeptText]]:
    kept = load_rollouts(run_dir)
    if not kept:
        raise ValueError(f"'{run_dir}' holds no rollouts/step_N.json; name the output_dir of a run that kept rollouts")
    return kept


def _reward(sample: KeptSample) -> float | None:
    if sample["pointwise"] is None or sample["pairwise"] is None:
        return None
    return sample["pointwise"] + sample["pairwise"]


def _mean_logprob(sample: KeptSample) -> float | None:
    counted = [
        value for value, kept in zip(sample["logprobs"], sample["mask"], strict=True) if kept and value is not None
    ]
    return sum(counted) / len(counted) if counted else None


def _tinted(sample: KeptSample) -> Text:
    """The tokens of a sample; improbable ones (below 10 %) underlined, those after a stop left out."""
    text = Text()
    for token, logprob, kept in zip(sample["tokens"], sample["logprobs"], sample["mask"], strict=True):
        if kept:
            text.append(_line(token), style="underline" if logprob is not None and logprob < -2.3 else "")
    return text


def _line(text: str) -> str:
    """A text in one line, as the page has it."""
    return re.sub(" {4,}", lambda run: f"␣{len(run[0])}", text.replace("\n", "↵").replace("\t", "⇥"))


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"
