"""Energy-based fine-tuning (arXiv 2603.12248) on torchtune components.

    tune run --nproc_per_node 1 recipes/ebft.py --config configs/quickstart.yaml

Read :meth:`EBFTRecipe.step` first: it is the method, one line per arrow of
``batch -> rollouts -> features -> rewards -> advantages -> log-probs -> loss``. Each of these parts is named by YAML.
"""

import functools
import math
import operator
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console

from components import evaluation, training
from components.data import Rows, StreamedText, Tokenizer, batch_loader, train_stream
from components.features import MovingAverage
from components.losses import TokenCounts
from components.models import Policy, deferred_weights
from components.report import before_after, plot_run
from components.rewards import SandboxError
from components.rollouts import duplicate_share
from components.schedules import scheduled
from components.types import Batch, Loss, Rewards, Rollouts


class EBFTRecipe:
    """One training run, from a config."""

    def __init__(self, cfg: DictConfig) -> None:
        training.check_recipe(cfg)
        self.cfg = cfg
        self.output_dir = Path(cfg.output_dir)
        self.accumulation = cfg.get("gradient_accumulation_steps", 1)
        self.steps_done = 0
        self.interrupted = False
        self.validated_at: int | None = None
        self.validation_means: dict[str, float] = {}
        # Tensors besides the policy's that training changes, for checkpoints.
        self.extra: dict[str, torch.Tensor] = {}

    # ------------------------------------------------------------------------------------------------ setup

    def setup(self) -> None:
        """Build everything and check that it fits together; nothing in ``output_dir`` is touched before the end."""
        cfg = self.cfg
        self.device = training.start(cfg.device, timeout_minutes=cfg.get("timeout_minutes", 30))
        training.say_warnings_once()
        training.keep_freed_memory()
        checkpoint = training.find_checkpoint(cfg)
        self.rng = training.seed_everything(cfg.seed)
        rank, world = dist.get_rank(), dist.get_world_size()

        with training.timed("data"):
            self.tokenizer = training.instantiate(cfg.tokenizer, path="tokenizer", kind=Tokenizer)
            dataset = training.instantiate(
                cfg.dataset, path="dataset", kind=Rows | StreamedText, tokenizer=self.tokenizer
            )
            self.stream = train_stream(dataset, batch_size=cfg.batch_size, seed=cfg.seed, rank=rank, world_size=world)
            if "max_steps" in cfg:
                self.max_steps = cfg.max_steps
            else:
                self.max_steps = max(1, cfg.epochs * (self.stream.batches_per_epoch // self.accumulation))
            self.validation_loader = held_out = None
            if "validation" in cfg:
                held_out = training.instantiate(
                    cfg.validation.dataset, path="validation.dataset", kind=Rows, tokenizer=self.tokenizer
                )
                self.validation_loader = batch_loader(
                    held_out, batch_size=cfg.validation.batch_size, seed=0, shuffle=False, rank=rank, world_size=world
                )

        training.rehearse(cfg, max_steps=self.max_steps)
        with training.timed("model"), deferred_weights():
            self.policy = Policy(training.instantiate(cfg.model, path="model"))
            vocabulary = self.policy.decoder.tok_embeddings.num_embeddings
            if self.tokenizer.vocab_size > vocabulary:
                raise ValueError(
                    f"the tokenizer has {self.tokenizer.vocab_size} tokens, the model {vocabulary}: tokenizer and model "
                    "must come from the same checkpoint"
                )

        self.loss = training.instantiate(cfg.loss, path="loss", kind=Loss)
        parts = training.build_parts(
            cfg, loss=self.loss, policy=self.policy, tokenizer=self.tokenizer, device=self.device
        )
        self.generator, self.feature_extractor = parts.training.generator, parts.training.feature_extractor
        self.reward, self.advantage = parts.training.reward, parts.advantage
        self.reference, self.measuring = parts.reference, parts.validation
        self.average = parts.network if isinstance(parts.network, MovingAverage) else None
        if self.average is not None:
            self.average.check(self.policy)
            self.extra = self.average.tensors()
        training.check_parts(policy=self.policy, parts=parts, loss=self.loss, dataset=dataset, held_out=held_out)

        with training.timed("sharding and optimizer"):
            training.shard(
                self.policy,
                self.device,
                dtype=cfg.dtype,
                activation_checkpointing=cfg.get("activation_checkpointing", False),
                compile=cfg.get("compile", False),
                cpu_offload=cfg.get("cpu_offload", False),
                data_parallel_replicate=cfg.get("data_parallel_replicate", 1),
            )
            # Only now: it may be the policy that is read.
            self.frozen = training.frozen_weights(self.policy, parts)
            trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
            self.optimizer = training.instantiate(
                cfg.optimizer, path="optimizer", kind=training.Optimizer, params=trained
            )
            self.lr_scheduler = training.build_scheduler(cfg, self.optimizer, max_steps=self.max_steps)
            self.checkpointer = training.instantiate(
                cfg.checkpointer,
                path="checkpointer",
                kind=training.Checkpointer,
                output_dir=str(self.output_dir),
                keep_last=cfg.get("keep_last", 1),
            )

        self._open_output(checkpoint)

    def _open_output(self, checkpoint: training.Checkpoint | None) -> None:
        """From here on the run owns ``output_dir``."""
        if checkpoint is not None:
            with training.timed(f"resuming from {checkpoint.path}"):
                self._restore(checkpoint)
        with training.taken(self.output_dir, overwrite=self.cfg.get("resume") == "overwrite"):
            self.metrics_log = training.MetricsLog(self.output_dir)
            self.loggers = training.build_loggers(self.cfg)
            if training.is_main():
                training.save_config(self.cfg, self.output_dir)
                self.metrics_log.truncate(self.steps_done)
                evaluation.forget_validations(self.output_dir, after=self.steps_done)
                training.forget_rollouts(self.output_dir, after=self.steps_done)

    def _restore(self, checkpoint: training.Checkpoint) -> None:
        training.check_frozen(checkpoint, self.frozen)
        # A new schedule goes on as if it had been the run's from its start.
        old_schedule = not checkpoint.new_schedule
        state = self.checkpointer.load(
            checkpoint.path, self.policy, self.optimizer, self.extra, hyperparameters=old_schedule
        )
        self.steps_done = checkpoint.manifest.step
        self.validated_at, self.validation_means = checkpoint.manifest.validated_at, checkpoint.manifest.metrics
        self.stream.load_state_dict(state["stream"])
        same_ranks = len(state["rng"]) == dist.get_world_size()
        training.set_rng_state(self.rng, state["rng"][dist.get_rank() if same_ranks else 0])
        if self.lr_scheduler is not None and old_schedule:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        elif self.lr_scheduler is not None:
            for _ in range(self.steps_done):
                self.lr_scheduler.step()

    # ------------------------------------------------------------------------------------------------ train

    def train(self) -> None:
        """Steps until ``max_steps`` or a signal, with validation, logging and checkpoints in between."""
        cfg, save_every = self.cfg, self.cfg.get("save_every_n_steps", self.max_steps)
        pauses = {"saving": save_every}
        if self.validation_loader is not None:
            pauses["validation"] = cfg.validation.every_n_steps
        history = training.read_metrics(self.output_dir)
        with (
            training.Progress(total=self.max_steps, done=self.steps_done, pauses=pauses, history=history) as progress,
            training.Interrupt(progress.note) as interrupt,
        ):
            if self._validation_due():
                with progress.pause("validation"):
                    self.validate(interrupt)
            while self.steps_done < self.max_steps and not self.interrupted:
                with training.phase("data", step=self.steps_done + 1):
                    batches = [next(self.stream).to(self.device) for _ in range(self.accumulation)]
                try:
                    metrics = self.step(batches)
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"step {self.steps_done + 1}, rank {dist.get_rank()}: {error}; weights were not changed by this "
                        f"step; {training.newest_checkpoint(self.output_dir)}"
                    ) from error
                self.steps_done += 1
                last, self.interrupted = self.steps_done == self.max_steps, interrupt.agreed()
                logged = last or self.steps_done % cfg.get("log_every_n_steps", 1) == 0
                if logged:
                    self.log(metrics)
                progress.advance(metrics, logged=logged)
                if self._validation_due() and not self.interrupted:  # it may take longer than we are given
                    with progress.pause("validation"):
                        self.validate(interrupt)
                if last or self.interrupted or self.steps_done % save_every == 0:
                    with progress.pause("saving"):
                        self.save()
                    self.interrupted = interrupt.agreed()
                with training.phase("saving"):
                    self.checkpointer.poll()
            with progress.pause("saving"), training.phase("saving"):
                self.checkpointer.wait()

    def step(self, batches: list[Batch]) -> dict[str, float]:
        """One on-policy update (paper, algorithm 1) from the micro-batches of a step."""
        metrics, step = training.StepMetrics(), self.steps_done
        drawn: list[tuple[Batch, Rollouts, torch.Tensor]] = []
        for batch in batches:
            with metrics.phase("rollouts"):
                rollouts = self.generator(self.policy, batch, self.rng)
            with metrics.phase("features"):
                features = self.feature_extractor(batch, rollouts)
            with metrics.phase("rewards"):
                rewards = self.reward(batch, rollouts, features)
                advantages = self.advantage(rewards)
            if not drawn:
                self._keep_rollouts(batch, rollouts, rewards, advantages)
            drawn.append((batch, rollouts, advantages))
            blocks = int(rewards.mask.sum())
            metrics.add(rewards.metrics | {"duplicate_rollouts": duplicate_share(rollouts)}, weight=blocks)
            counted = advantages.transpose(1, 2)[rewards.mask]
            metrics.add({"advantage_std": float(counted.std()) if counted.numel() > 1 else 0.0}, weight=blocks)

        counts = _total_counts([TokenCounts.of(batch, rollouts) for batch, rollouts, _ in drawn])
        for number, (batch, rollouts, advantages) in enumerate(drawn, start=1):
            reference = None
            if self.reference is not None:
                with metrics.phase("reference"):
                    reference = self.reference(batch, rollouts, temperature=self.generator.temperature)
            with metrics.phase("update"):
                reduce = number == len(drawn) or self.cfg.get("reduce_every_micro_batch", False)
                training.sync_gradients(self.policy, on=reduce)
                logprobs = self.policy(batch, rollouts, temperature=self.generator.temperature, with_target=True)
                output = self.loss(logprobs, advantages, batch, rollouts, counts, reference=reference, step=step)
                # FSDP averages gradients over ranks; the loss is already divided by the counts of all of them.
                (output.loss * dist.get_world_size()).backward()
            metrics.add_parts(output.metrics)
            gap = (logprobs.rollout.detach() - rollouts.logprobs).abs()[rollouts.mask]
            metrics.add({"logprob_gap": float(gap.mean()) if gap.numel() else 0.0}, weight=gap.numel())
        lr = float(self.optimizer.param_groups[0]["lr"])  # torchao keeps it in a tensor
        with metrics.phase("optimizer"):
            grad_norm = self.update()
        result = metrics.mean() | {"grad_norm": grad_norm, "lr": lr} | scheduled(self.loss, step)
        result["tokens_per_second"] = float(counts.rollout) / result["seconds/step"]
        return result | {"peak_memory_gib": training.peak_memory_gib()}

    def _keep_rollouts(self, batch: Batch, rollouts: Rollouts, rewards: Rewards, advantages: torch.Tensor) -> None:
        """For people to read, twenty times in a run unless it says how often (``ebft rollouts``)."""
        every = self.cfg.get("keep_rollouts_every_n_steps", max(1, self.max_steps // 20))
        if training.is_main() and rewards.mask.any() and (self.steps_done + 1) % every == 0:
            training.save_rollouts(
                self.output_dir,
                self.steps_done + 1,
                tokenizer=self.tokenizer,
                batch=batch,
                rollouts=rollouts,
                rewards=rewards,
                advantages=advantages,
            )

    def update(self) -> float:
        """Clip, check, step; the gradient norm before clipping."""
        norm = training.clip_grad_norm(list(self.policy.parameters()), self.cfg.get("clip_grad_norm"))
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite; lower optimizer.lr or set clip_grad_norm")
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.follow(self.policy, step=self.steps_done + 1)
        return norm

    def _validation_due(self) -> bool:
        """Before the first step, after the last and every so often; also if an interrupted run left it out."""
        if self.validation_loader is None or self.validated_at == self.steps_done:
            return False
        return self.steps_done == self.max_steps or self.steps_done % self.cfg.validation.every_n_steps == 0

    def validate(self, interrupt: training.Interrupt) -> None:
        """Measure the policy on held-out rows and keep the result row by row; given up if the run is to stop."""
        start = time.perf_counter()
        measured = evaluation.validate(
            self.policy,
            self._held_out(interrupt),
            self.measuring.generator,
            self.measuring.feature_extractor,
            self.measuring.reward,
            seed=self.cfg.seed,
        )
        if self.interrupted:
            return
        measured = evaluation.merge(training.gather(measured))
        self.validated_at, self.validation_means = self.steps_done, {k: entry.mean() for k, entry in measured.items()}
        self.checkpointer.check_metrics(self.validation_means)
        if training.is_main():
            evaluation.save_validation(self.output_dir, self.steps_done, measured)
            means = {f"validation/{name}": mean for name, mean in self.validation_means.items()}
            for logger in self.loggers:
                logger.log_dict(means, step=self.steps_done)
            shown = (name for name in ("cross_entropy", "feature_matching_loss") if name in measured)
            numbers = ", ".join(f"{name.replace('_', ' ')} {measured[name].mean():.4f}" for name in shown)
            training.say(f"step {self.steps_done}: validation {numbers} ({time.perf_counter() - start:.0f} s)")

    def _held_out(self, interrupt: training.Interrupt) -> Iterator[Batch]:
        assert self.validation_loader is not None
        for batch in training.phases("validation", self.validation_loader):
            yield batch.to(self.device)
            self.interrupted = interrupt.agreed()
            if self.interrupted:
                return

    def log(self, metrics: dict[str, float]) -> None:
        """To ``metrics.jsonl`` and the metric loggers of YAML."""
        if not training.is_main():
            return
        self.metrics_log.append(self.steps_done, metrics)
        for logger in self.loggers:
            logger.log_dict(metrics, step=self.steps_done)

    # ------------------------------------------------------------------------------------------------- end

    def save(self) -> None:
        """A checkpoint from which the run goes on exactly, and whose weights transformers loads."""
        manifest = training.Manifest(
            step=self.steps_done,
            config=training.plain_values(self.cfg),
            world_size=dist.get_world_size(),
            frozen=self.frozen,
            validated_at=self.validated_at,
            metrics=self.validation_means,
        )
        state = {
            "stream": self.stream.state_dict(),
            "rng": training.gather(training.rng_state(self.rng)),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
        }
        with training.phase("saving"):
            self.checkpointer.save(manifest, self.policy, self.optimizer, state, self.extra)

    def cleanup(self) -> None:
        """Plots, the table of what changed, and where everything is; of an interrupted run, how to go on."""
        if training.is_main():
            for logger in self.loggers:
                logger.close()
            if self.interrupted:
                training.say(f"stopped after step {self.steps_done}; go on with: {training.resume_command(self.cfg)}")
            else:
                plots = plot_run(self.output_dir)
                if len(evaluation.load_validations(self.output_dir)) > 1:
                    Console().print(before_after(self.output_dir))
                training.say(f"plots: {', '.join(map(str, plots))}")
            training.say(training.newest_checkpoint(self.output_dir))
        training.stop()


def _total_counts(counts: list[TokenCounts]) -> TokenCounts:
    """Tokens of the whole step, over micro-batches and ranks."""
    here = functools.reduce(operator.add, counts)
    return TokenCounts(rollout=training.total(here.rollout), target=training.total(here.target))


def main() -> int:
    """Run the recipe; what a user can mend is said in one sentence, without a traceback, and by one process."""
    mistakes: tuple[type[Exception], ...] = (ValueError,)
    try:
        cfg = training.parse_args()
        with training.naming_file(cfg):
            recipe = EBFTRecipe(cfg)
            recipe.setup()
        mistakes = (FloatingPointError, training.CheckpointError, SandboxError)
        recipe.train()
        recipe.cleanup()
    except Exception as error:
        return training.fail(f"error: {error}" if isinstance(error, mistakes) else traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(main())
