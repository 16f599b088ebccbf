"""One rank of the equality tests: trains the named cases one after the other in the process group it is started in.

    torchrun --nproc_per_node N tests/distributed/worker.py DIRECTORY OUT CASE...

``DIRECTORY`` holds the checkpoint and the corpus of ``tests.checkpoints``; each case leaves ``OUT/CASE.pt`` there.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from components import evaluation, training
from components.blocks import StridedAnchors
from components.models import Policy
from components.rollouts import BlockParallelGenerator, NoRollouts
from recipes.ebft import EBFTRecipe
from tests.tiny import tiny_batch, tiny_decoder, whole

ROOT = Path(__file__).parents[2]
ROWS = 4  # of a step, over all ranks and micro-batches
STEPS = 5


@dataclass(frozen=True)
class Case:
    """A run: its settings, and those it has besides in a group of ranks. ``like`` names the case whose numbers it must give."""

    settings: tuple[str, ...] = ("~validation",)
    spread: tuple[str, ...] = ()
    micro_batches: int = 1
    like: str | None = None


CASES = {
    "ebft": Case(()),
    "accumulated": Case(micro_batches=2, like="ebft"),
    "offloaded": Case(spread=("cpu_offload=true",), like="ebft"),
    "replicated": Case(spread=("data_parallel_replicate=2",), like="ebft"),
    "reduced_at_once": Case(spread=("reduce_every_micro_batch=true",), micro_batches=2, like="ebft"),
    "resumed": Case((), like="ebft"),
    "supervised": Case(
        (
            *("~validation", "~feature_extractor", "loss.rl_coef=0", "loss.ce_coef=1"),
            *("optimizer=torch.optim.AdamW", "~optimizer.momentum", "optimizer.eps=1.0e-3"),
        )
    ),
    "uneven": Case(("~validation", "dataset=tests.distributed.parts.UnevenRows", "~dataset.source")),
    "stopping": Case(("~validation", "generator.stop_tokens=[1,2,3,4,5,6,7,8,9,10]", "activation_checkpointing=true")),
    "lora": Case(
        ("~validation", "model=components.models.load_lora_decoder", "model.apply_lora_to_mlp=true", "optimizer.lr=0.1")
    ),
    "adapter_free": Case(
        (
            *("~validation", "model=components.models.load_lora_decoder", "model.apply_lora_to_mlp=true"),
            *("optimizer.lr=0.1", "feature_extractor.network=components.features.AdapterFree"),
            "~feature_extractor.network.decoder",
        ),
        like="lora",
    ),
    "qlora": Case(
        (
            *("~validation", "model=components.models.load_lora_decoder", "model.quantize_base=true"),
            *("model.apply_lora_to_mlp=true", "optimizer.lr=0.02", "model.checkpoint_dir={directory}/wide"),
        ),
    ),
    "lora_offloaded": Case(
        (
            *("~validation", "model=components.models.load_lora_decoder", "optimizer.lr=0.1", "loss.kl_coef=0.5"),
            *("feature_extractor.network=components.features.AdapterFree", "~feature_extractor.network.decoder"),
            "reference={_component_: components.features.NetworkReference}",
        ),
        spread=("cpu_offload=true",),
        micro_batches=2,
    ),
    "sharded_features": Case(spread=("feature_extractor.network.shard=true",), like="ebft"),
    "sharded_in_copies": Case(
        spread=("feature_extractor.network.shard=true", "data_parallel_replicate=2"), like="ebft"
    ),
    "kl": Case(
        (
            *("~validation", "loss.kl_coef=0.5", "feature_extractor.network.keep_head=true"),
            "reference={_component_: components.features.NetworkReference}",
        )
    ),
    "average": Case(
        (
            *("~validation", "feature_extractor.network=components.features.MovingAverage"),
            *("feature_extractor.network.decay=0.5", "optimizer.lr=0.05"),
        )
    ),
    "frozen": Case(("~validation", "model=tests.distributed.parts.load_mostly_frozen_decoder", "seed=2")),
}


def overrides(directory, out, name):
    """The quickstart on the tiny model, with SGD: Adam would turn a gradient of rounding errors into a whole step.

    Rounding may tip a sampled token, at odds of about one in a million draws. It does not with these settings.
    """
    case, world_size = CASES[name], dist.get_world_size()
    micro_batches = 1 if world_size == 1 else case.micro_batches
    return [
        f"model.checkpoint_dir={directory / 'checkpoint'}",
        f"dataset.source.path={directory / 'corpus.jsonl'}",
        f"validation.dataset.source.path={directory / 'corpus.jsonl'}",
        f"output_dir={directory / ('alone/ebft' if name == 'resumed' else f'{out}/{name}')}",
        "dataset.seq_len=48",
        "validation.dataset.max_rows=5",  # no multiple of a number of ranks: some get rows of padding
        "validation.batch_size=1",
        "generator.anchors.stride=12",
        "~metric_logger",
        "optimizer=torch.optim.SGD",
        "~optimizer.betas",
        "optimizer.lr=0.005",
        "optimizer.momentum=0.5",
        f"max_steps={STEPS}",
        "save_every_n_steps=3",
        "keep_last=2",
        f"batch_size={ROWS // world_size // micro_batches}",
        f"gradient_accumulation_steps={micro_batches}",
        *(setting.format(directory=directory) if "{directory}" in setting else setting for setting in case.settings),
        *(() if world_size == 1 else case.spread),
    ]


class RecordedRecipe(EBFTRecipe):
    """The recipe, keeping the gradient of every step and what its generator draws."""

    def setup(self):
        super().setup()
        self.gradients, self.drawn = [], []
        generator = self.generator

        class Recorded:
            def __getattr__(_, attribute):
                return getattr(generator, attribute)

            def __call__(_, *args):
                rollouts = generator(*args)
                self.drawn.append(rollouts.tokens)
                return rollouts

        self.generator = Recorded()

    def update(self):
        named = ((name, p.grad) for name, p in self.policy.named_parameters() if p.grad is not None)
        self.gradients.append({name: whole(gradient) for name, gradient in named})
        return super().update()


def train(directory, out, name):
    """Run a case; what must not depend on the number of ranks, gathered on all of them."""
    recipe = RecordedRecipe(training.load_config(ROOT / "configs" / "quickstart.yaml", overrides(directory, out, name)))
    recipe.setup()
    recipe.train()
    rows = torch.stack(training.gather(torch.cat(recipe.drawn)), dim=1).flatten(0, 1)  # in the data stream's order
    validations = evaluation.load_validations(recipe.output_dir) if "validation" in recipe.cfg else {}
    return {
        "log": training.read_metrics(recipe.output_dir),
        "validations": {step: {key: vars(m) for key, m in row.items()} for step, row in validations.items()},
        "gradients": recipe.gradients,
        "weights": {name: whole(value) for name, value in recipe.policy.state_dict().items()},
        "tokens": rows.unflatten(0, (-1, ROWS)),
    }


def all_gathers(rollout_len):
    """How often weights are gathered in one rollout, how many groups of them there are, and which are left whole."""
    policy = Policy(tiny_decoder())
    training.shard(policy, torch.device("cpu"), dtype="fp32", activation_checkpointing=False, compile=False)
    generator = BlockParallelGenerator(
        anchors=StridedAnchors(stride=3, context_len=2), rollout_len=rollout_len, num_samples=2, temperature=1.0
    )
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        generator(policy, tiny_batch(), torch.Generator().manual_seed(0))
    return {
        "calls": sum(event.name == "c10d::_allgather_base_" for event in recorded.events()),
        "groups": sum(isinstance(module, FSDPModule) for module in policy.modules()),
        "whole": [name for name, parameter in policy.named_parameters() if not isinstance(parameter, DTensor)],
    }


def reductions(*, at_once):
    """How often gradients are reduced in a step of two micro-batches, and how many groups of weights there are."""
    policy = Policy(tiny_decoder())
    training.shard(policy, torch.device("cpu"), dtype="fp32", activation_checkpointing=False, compile=False)
    batch = tiny_batch()
    rollouts = NoRollouts()(policy, batch, torch.Generator())
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for last in (False, True):
            training.sync_gradients(policy, on=last or at_once)
            policy(batch, rollouts, temperature=1.0, with_target=True).target.sum().backward()
    return {
        "calls": sum(event.name == "c10d::_reduce_scatter_base_" for event in recorded.events()),
        "groups": sum(isinstance(module, FSDPModule) for module in policy.modules()),
    }


MEASURED = {
    "all_gathers": lambda: {G: all_gathers(G) for G in (1, 2, 8)},
    "reductions": lambda: {at_once: reductions(at_once=at_once) for at_once in (False, True)},
}


def main():
    directory, out, *names = Path(sys.argv[1]), *sys.argv[2:]
    training.start("cpu", timeout_minutes=2)
    (directory / out).mkdir(exist_ok=True)
    for name in names:
        result = MEASURED[name]() if name in MEASURED else train(directory, out, name)
        if training.is_main():
            torch.save(result, directory / out / f"{name}.pt")
    training.stop()


if __name__ == "__main__":
    main()
