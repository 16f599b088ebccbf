"""Scores one or several checkpoints by one YAML, and says how far each is from the first, or from those it names.

    tune run --nproc_per_node 1 recipes/evaluate.py --config configs/smollm2_135m/evaluate.yaml

A measure is any ``_component_`` under ``measures``; every checkpoint meets the same rows and random numbers, so that
differences are paired. What was measured before, of the same weights under the same settings by the same code, is not
measured again.
"""

import sys
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from torch import nn

from components import __version__, evaluation, training
from components.data import Tokenizer
from components.evaluation import Candidate, Measure, Scores
from components.models import deferred_weights
from components.report import comparison, plot_comparison


class EvaluationRecipe:
    """One evaluation, from a config."""

    def __init__(self, cfg: DictConfig) -> None:
        evaluation.check_evaluation(cfg)
        self.cfg = cfg
        self.output_dir = Path(cfg.output_dir)

    # ------------------------------------------------------------------------------------------------ setup

    def setup(self) -> None:
        """Build all measures, and check that all checkpoints are there and can be measured; none is loaded yet."""
        cfg = self.cfg
        self.device = training.start(cfg.device, timeout_minutes=cfg.get("timeout_minutes", 30))
        training.say_warnings_once()
        training.seed_everything(cfg.seed)
        self.candidates = evaluation.find_candidates(cfg)
        with training.timed("tokenizer and measures"):
            tokenizer = training.instantiate(cfg.tokenizer, path="tokenizer", kind=Tokenizer)
            self.measures: dict[str, Measure] = {}
            for name, node in cfg.measures.items():
                with deferred_weights():
                    self.measures[name] = training.instantiate(
                        node, path=f"measures.{name}", kind=Measure, offered={"tokenizer": tokenizer}
                    )
        evaluation.check_candidates(self.candidates, self.measures, tokenizer.vocab_size)
        with training.timed("feature networks"):
            self.networks = {name: self._place_network(measure) for name, measure in self.measures.items()}
        with training.timed("fingerprints"):
            # Rank 0's, since all read the same files.
            self.fingerprints = {
                candidate.name: training.gather(candidate.fingerprint() if training.is_main() else None)[0]
                for candidate in self.candidates
            }
        if self.cfg.get("resume") == "overwrite" and training.is_main():
            evaluation.forget_found(self.output_dir)
        training.gather(None)  # nobody reads what is being removed
        self.scores: dict[str, dict[str, Scores]] = {name: {} for name in self.measures}
        for name, measure in self.measures.items():
            groups = evaluation.row_groups(measure.dataset)
            for candidate in self.candidates:
                found = evaluation.load_scores(
                    self.output_dir, name, candidate.name, self._key(name, candidate), groups
                )
                if found is not None:
                    self.scores[name][candidate.name] = found
        training.gather(None)  # nobody writes before all have read
        if training.is_main():
            training.save_config(cfg, self.output_dir)

    def _place_network(self, measure: Measure) -> str | None:
        """Give a measure's feature network its weights, once for all checkpoints; its identity, if it has one."""
        extractor = getattr(measure, "feature_extractor", None)
        for part in vars(extractor or object).values():
            if isinstance(part, nn.Module):
                training.place(part, self.device)
        identity = getattr(getattr(extractor, "network", None), "identity", None)
        return None if identity is None else identity()

    def _key(self, name: str, candidate: Candidate) -> dict[str, Any]:
        """All that decides what a measure finds on a checkpoint."""
        return {
            "code": {"version": __version__, "revision": self.measures[name].REVISION},
            "checkpoint": self.fingerprints[candidate.name],
            "data": self.measures[name].dataset.fingerprint,
            "feature_network": self.networks[name],
            "measure": training.plain_values(self.cfg.measures[name]),
            "dtype": self.cfg.dtype,
            "seed": self.cfg.seed,
        }

    # --------------------------------------------------------------------------------------------- evaluate

    def evaluate(self) -> None:
        """Every measure of every checkpoint that is not there yet; the summary grows with each."""
        for candidate in self.candidates:
            missing = [name for name, found in self.scores.items() if candidate.name not in found]
            if len(missing) < len(self.measures):
                training.say(f"{candidate.name}: {len(self.measures) - len(missing)} measures are there already")
            if not missing:
                continue
            with training.timed(f"{candidate.name}: loading"):
                policy = candidate.load().requires_grad_(False).eval()
                training.shard(policy, self.device, dtype=self.cfg.dtype, activation_checkpointing=False, compile=False)
            for name in missing:
                start = time.perf_counter()
                found = evaluation.run_measure(
                    self.measures[name], policy, name=name, device=self.device, seed=self.cfg.seed
                )
                self.scores[name][candidate.name] = found.scores
                if training.is_main():
                    evaluation.save_found(self.output_dir, name, candidate.name, found, self._key(name, candidate))
                training.say(f"{candidate.name}: {name}: {time.perf_counter() - start:.0f} s")
            del policy

    # ------------------------------------------------------------------------------------------------- save

    def save(self) -> None:
        """``results.json``, plots and tables, from one process."""
        if not training.is_main():
            return
        resamples = self.cfg.get("resamples", 2000)
        compare_with = list(self.cfg.get("compare_with", [self.candidates[0].name]))
        measures = {}
        for name, scores in self.scores.items():
            estimates = evaluation.compare(scores, compare_with=compare_with, resamples=resamples, seed=self.cfg.seed)
            measures[name] = evaluation.summarise(next(iter(scores.values())), estimates) | {
                "data": self.measures[name].dataset.fingerprint,
                "notes": self.measures[name].notes,
            }
        summary = {
            "config": training.plain_values(self.cfg),
            "checkpoints": {
                candidate.name: {"files": [str(path) for path in candidate.files]}
                | {"fingerprint": self.fingerprints[candidate.name]}
                for candidate in self.candidates
            },
            "compare_with": compare_with,
            "resamples": resamples,
            "measures": measures,
        }
        evaluation.save_summary(self.output_dir, summary)
        console = Console(width=None if sys.stdout.isatty() else 120)
        for table in comparison(summary):
            console.print(table)
        plots = plot_comparison(summary, self.output_dir / "plots")
        training.say(", ".join(map(str, [self.output_dir / "results.json", *plots])))

    def cleanup(self) -> None:
        """Leave the process group."""
        training.stop()


def main() -> int:
    """Run the recipe; what a user can mend is said in one sentence, without a traceback, and by one process."""
    mistakes: tuple[type[Exception], ...] = (ValueError,)
    try:
        cfg = training.parse_args()
        with training.naming_file(cfg):
            recipe = EvaluationRecipe(cfg)
            recipe.setup()
        mistakes = (FloatingPointError, evaluation.NothingToMeasure)
        recipe.evaluate()
        recipe.save()
        recipe.cleanup()
    except Exception as error:
        return training.fail(f"error: {error}" if isinstance(error, mistakes) else traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(main())
