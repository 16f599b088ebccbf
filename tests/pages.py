"""Runs on disk for tests of the pages: hand-written numbers, with text that would break a page that does not escape."""

import json
from pathlib import Path

from components.evaluation import Measured, Scores, compare, save_summary, save_validation, summarise
from components.training import MetricsLog

HOSTILE = '</script><img src="http://example.invalid/x.png" onerror="document.title=\'broken\'"><!--\u2028&amp;'


def write_run(folder: Path, *, lr: float = 1e-5, steps: int = 6, shift: float = 0.0) -> Path:
    """A finished run: six logged steps, and validations of steps 0 and 6 over four rows."""
    folder.mkdir(parents=True)
    settings = {"output_dir": str(folder), "optimizer": {"lr": lr}, "note": HOSTILE, "log": f"{folder}/tensorboard"}
    (folder / "config.yaml").write_text(json.dumps(settings))
    log = MetricsLog(folder)
    for step in range(1, steps + 1):
        seconds = {"seconds/rollouts": 2.0, "seconds/update": 5.0, "seconds/step": 8.0}
        log.append(step, {"reward": step / 10 + shift, "lr": lr, "odd/share": 0.5, "kl": float("nan")} | seconds)
    save_validation(folder, 0, {"cross_entropy": Measured([2.0, 3.0, 2.0, 3.0], [1, 1, 1, 1])})
    save_validation(folder, steps, {"cross_entropy": Measured([1.0, 2.0, 2.0, 3.0], [1, 1, 1, 1])})
    return folder


def write_rollouts(folder: Path, step: int = 1, *, rows: int = 1) -> Path:
    """Twelve tokens, anchors at 2, 5, 8 (which does not count) and 11. Rewards: 0 and 1 at 2 (alignment the same), 3 and -1
    at 5, and at 11 twice 2, the second a copy."""
    tokens = ["def ", "f", HOSTILE, ":\n", "    ", "return ", "", "é", "\n", "<b>", "x", "\n"]
    blocks = [
        {
            "anchor": anchor,
            "counts": counts,
            "truth": tokens[anchor : anchor + 2],
            "samples": [
                {
                    "tokens": [f"s{anchor}", HOSTILE if copy is None else "same"],
                    "logprobs": [-0.1, -4.0],
                    "mask": [1, int(counts)],
                    "pointwise": pointwise,
                    "pairwise": pairwise,
                    "advantage": advantage,
                    "copy_of": copy,
                }
                for pointwise, pairwise, advantage, copy in samples
            ],
        }
        for anchor, counts, samples in [
            (2, True, [(0.0, 0.0, -0.5, None), (1.0, 0.0, 0.5, None)]),
            (5, True, [(3.5, -0.5, 2.0, None), (-1.0, 0.0, -2.0, None)]),
            (8, False, [(0.0, 0.0, 0.0, None), (0.0, 0.0, 0.0, None)]),
            (11, True, [(2.5, -0.5, 0.0, None), (2.5, -0.5, 0.0, 0)]),
        ]
    ]
    path = folder / "rollouts" / f"step_{step:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"tokens": tokens, "documents": [0] * 9 + [1] * 3, "blocks": blocks}
    path.write_text(json.dumps([text] * rows), encoding="utf-8")
    return folder


def write_evaluation(folder: Path) -> Path:
    """``results.json`` of two checkpoints in nine groups: cross-entropies 2 and 3, a curve of four points without a value at
    the second, and a metric of which there was nothing to measure."""

    def scores(value: float) -> Scores:
        means = {
            "cross_entropy": (value, 1.0),
            "loss/1": (value / 4, 1.0),
            "loss/2": (0.0, 0.0),
            "loss/4": (value / 4, 1.0),
            "loss/8": (value / 8, 1.0),
            "none": (0.0, 0.0),
        }
        return Scores(
            groups=[f"g{row}" for row in range(9)], sums={name: [[*sums]] * 9 for name, sums in means.items()}
        )

    found = {"base": scores(2.0), HOSTILE: scores(3.0)}
    estimates = compare(found, compare_with=list(found), resamples=10, seed=0)
    measure = summarise(found["base"], estimates) | {"notes": {"cross_entropy": HOSTILE}}
    names = {"checkpoints": dict.fromkeys(found), "compare_with": list(found)}
    save_summary(folder, names | {"measures": {"heldout": measure}})
    return folder
