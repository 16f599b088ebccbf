"""One rank of the equality tests: trains the named cases one after the other in the process group it is started in.

    torchrun --nproc_per_node N tests/distributed/worker.py DIRECTORY CASE...

``DIRECTORY`` holds the checkpoint and the corpus of ``tests.checkpoints``; each case leaves ``worldN/CASE.pt`` there.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from components import training
from components.blocks import StridedAnchors
from components.models import Policy
from components.rollouts import BlockParallelGenerator
from recipes.ebft import EBFTRecipe
from tests.tiny import tiny_batch, tiny_decoder

ROOT = Path(__file__).parents[2]
ROWS = 4  # of a step, over all ranks and micro-batches
STEPS = 5


@dataclass(frozen=True)
class Case:
    """What a run has besides the common settings, alone and in a group; ``like`` names the case whose numbers it must give."""

    settings: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    micro_batches: int = 1
    like: str | None = None


PLAIN = ("loss.ce_coef=0.1",)
SUPERVISED = ("loss.rl_coef=0", "loss.ce_coef=1")
CASES = {
    "ebft": Case(PLAIN),
    "accumulated": Case(PLAIN, micro_batches=2, like="ebft"),
    "offloaded": Case(PLAIN, spread=("cpu_offload=true",), like="ebft"),
    "replicated": Case(PLAIN, spread=("data_parallel_replicate=2",), like="ebft"),
    "resumed": Case(PLAIN, spread=("resume=auto",), like="ebft"),
    "supervised": Case((*SUPERVISED, "optimizer=torch.optim.AdamW", "optimizer.eps=1.0e-3")),
    "uneven": Case((*PLAIN, "dataset=tests.distributed.parts.UnevenRows", "~dataset.source")),
    "stopping": Case((*PLAIN, "generator.stop_tokens=[1,2,3,4,5,6,7,8,9,10]", "activation_checkpointing=true")),
    "frozen": Case((*PLAIN, "model=tests.distributed.parts.load_mostly_frozen_decoder")),
}


def overrides(directory, name, world_size):
    """The quickstart on the tiny model. SGD, because Adam turns a gradient of rounding errors into a whole step, and a
    temperature at which they tip no token in these few steps."""
    case, alone = CASES[name], world_size == 1
    micro_batches = 1 if alone else case.micro_batches
    return [
        f"model.checkpoint_dir={directory / 'checkpoint'}",
        f"dataset.source.path={directory / 'corpus.jsonl'}",
        f"validation.dataset.source.path={directory / 'corpus.jsonl'}",
        f"output_dir={directory / f'world{world_size}' / name}",
        "dataset.seq_len=48",
        "validation.dataset.max_rows=7",  # no multiple of a number of ranks: some get rows of padding
        "validation.batch_size=1",
        "~metric_logger",
        "optimizer=torch.optim.SGD",
        "~optimizer.betas",
        "optimizer.lr=0.1",
        "lr_scheduler.warmup=0",
        f"max_steps={STEPS}",
        "save_every_n_steps=3",
        "keep_last=2",
        f"batch_size={ROWS // world_size // micro_batches}",
        f"gradient_accumulation_steps={micro_batches}",
        *case.settings,
        *(() if alone else case.spread),
    ]


def train(directory, name):
    """Run a case; what must not depend on the number of ranks, gathered on all of them."""
    recipe = EBFTRecipe(
        training.load_config(ROOT / "configs" / "quickstart.yaml", overrides(directory, name, dist.get_world_size()))
    )
    recipe.setup()
    gradients, tokens = [], []

    def keep_gradients(optimizer, args, kwargs):
        named = ((name, p.grad) for name, p in recipe.policy.named_parameters() if p.grad is not None)
        gradients.append({name: gradient.full_tensor() for name, gradient in named})

    recipe.optimizer.register_step_pre_hook(keep_gradients)
    generator = recipe.generator

    class Recorded:
        """The generator, keeping what it draws."""

        def __getattr__(self, attribute):
            return getattr(generator, attribute)

        def __call__(self, *args):
            rollouts = generator(*args)
            tokens.append(rollouts.tokens)
            return rollouts

    recipe.generator = Recorded()
    recipe.train()
    rows = torch.stack(training.gather(torch.cat(tokens)), dim=1).flatten(0, 1)  # in the order of the data stream
    return {
        "log": training.read_metrics(recipe.output_dir),
        "validation": {
            path.stem: json.loads(path.read_text()) for path in sorted((recipe.output_dir / "validation").iterdir())
        },
        "gradients": gradients,
        "weights": {name: value.full_tensor() for name, value in recipe.policy.state_dict().items()},
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


def main():
    directory, names = Path(sys.argv[1]), sys.argv[2:]
    training.start("cpu", timeout_minutes=2)
    out = directory / f"world{dist.get_world_size()}"
    out.mkdir(exist_ok=True)
    for name in names:
        result = {G: all_gathers(G) for G in (1, 2, 8)} if name == "all_gathers" else train(directory, name)
        if training.is_main():
            torch.save(result, out / f"{name}.pt")
    training.stop()


if __name__ == "__main__":
    main()
