"""A run looked at before it starts: its parts on the meta device, its first batch as text, its arithmetic and its memory.

Everything is built by the recipe's own functions from the recipe's own config; only weights are left out. A checkpoint that is
not here yet is stood in for by its shape, if its directory is named after a model that is known.
"""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from components import training
from components.data import NotHere, Rows, StreamedText, Tokenizer, collate, first_rows
from components.estimate import GIB, Memory, Step, estimate_memory, flops_of
from components.features import FrozenNetwork, MovingAverage, NoFeatures
from components.models import Policy, deferred_weights, known_config, parse_dtype, read_config, write_stand_in
from components.types import Batch, Loss


@dataclass(kw_only=True)
class Preview:
    """What a config describes.

    Attributes:
        cfg: as the recipe reads it.
        model_config: ``config.json`` of the policy.
        policy: on the meta device.
        parts: of the step, their networks on the meta device.
        batch: the first rows of the dataset, or None if dataset or tokenizer are not here.
        tokenizer: None if it is not here.
        missing: what could not be looked at, a sentence each.
    """

    cfg: DictConfig
    model_config: dict[str, Any]
    policy: Policy
    parts: training.Parts
    batch: Batch | None = None
    tokenizer: Any = None
    missing: list[str] = field(default_factory=list)


@contextmanager
def preview(cfg: DictConfig) -> Iterator[Preview]:
    """Build what ``recipes/ebft.py`` would build of a config, without weights.

    Raises:
        ValueError: what the recipe would refuse at its start.
    """
    training.check_recipe(cfg)
    with tempfile.TemporaryDirectory() as folder:
        missing = _stand_in(cfg, Path(folder))
        training.start("cpu")
        try:
            yield _build(cfg, missing)
        finally:
            training.stop()


def _stand_in(cfg: DictConfig, folder: Path) -> list[str]:
    """Point every ``checkpoint_dir`` that is not here to a stand-in, in place; a sentence for each."""
    plain = training.plain_values(cfg)
    places: dict[str, str] = {}

    def visit(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            if key == "checkpoint_dir" and isinstance(value, str) and not Path(value).is_dir():
                config = known_config(value)
                if config is not None:
                    if value not in places:
                        places[value] = str(folder / str(len(places)))
                        write_stand_in(Path(places[value]), config)
                    node[key] = places[value]
            else:
                visit(value)

    visit(plain)
    if places:
        cfg.merge_with(OmegaConf.create(plain))
    return [
        f"checkpoint '{path}' is not here: its known shape was taken, its tokenizer not looked at" for path in places
    ]


class _AnyText:
    """In place of a tokenizer that is not here: whatever is named as a token is one."""

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return [0]


def _build(cfg: DictConfig, missing: list[str]) -> Preview:
    tokenizer = None
    if not missing:
        tokenizer = training.instantiate(cfg.tokenizer, path="tokenizer", kind=Tokenizer)
    with deferred_weights():
        policy = Policy(training.instantiate(cfg.model, path="model"))
    vocabulary = policy.decoder.tok_embeddings.num_embeddings
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocabulary}; both must come from one checkpoint"
        )
    loss = training.instantiate(cfg.loss, path="loss", kind=Loss)
    known: Any = _AnyText() if tokenizer is None else tokenizer
    parts = training.build_parts(cfg, loss=loss, policy=policy, tokenizer=known, device=torch.device("meta"))
    if isinstance(parts.network, MovingAverage):
        parts.network.check(policy)
    _build_rest(cfg)
    found = Preview(
        cfg=cfg,
        model_config=read_config(cfg.model.checkpoint_dir),
        policy=policy,
        parts=parts,
        tokenizer=tokenizer,
        missing=missing,
    )
    if tokenizer is not None:
        try:
            dataset = training.instantiate(cfg.dataset, path="dataset", kind=Rows | StreamedText, tokenizer=tokenizer)
            held_out = None
            if "validation" in cfg:
                held_out = training.instantiate(
                    cfg.validation.dataset, path="validation.dataset", kind=Rows, tokenizer=tokenizer
                )
        except ValueError as error:
            if not isinstance(error.__cause__, NotHere):
                raise
            missing.append(str(error))
        else:
            training.check_parts(policy=policy, parts=parts, loss=loss, dataset=dataset, held_out=held_out)
            found.batch = collate(first_rows(dataset, cfg.batch_size))
    return found


def _build_rest(cfg: DictConfig) -> None:
    """What needs no weights to be refused: optimizer, schedule and checkpointer."""
    optimizer = training.instantiate(
        cfg.optimizer, path="optimizer", kind=training.Optimizer, params=[nn.Parameter(torch.zeros(1))]
    )
    if "lr_scheduler" in cfg:
        known = {"max_steps": cfg.get("max_steps", 100)} if training.accepts(cfg.lr_scheduler, "max_steps") else {}
        training.instantiate(
            cfg.lr_scheduler, path="lr_scheduler", kind=training.Scheduler, optimizer=optimizer, **known
        )
    training.instantiate(
        cfg.checkpointer,
        path="checkpointer",
        kind=training.Checkpointer,
        output_dir=cfg.output_dir,
        keep_last=cfg.get("keep_last", 1),
    )


def show(found: Preview) -> Group:
    """What ``ebft validate`` prints: which parts there are, the first row with its anchors, and what could not be looked at."""
    table = Table(title="parts", show_header=False, title_justify="left")
    kinds = {"policy": found.policy.decoder, **found.parts.training._asdict(), "advantage": found.parts.advantage}
    for name, part in kinds.items():
        table.add_row(name.replace("_", " "), type(part).__name__)
    if found.parts.network is not None:
        table.add_row("feature network", type(found.parts.network).__name__)
    parts: list[Any] = [table]
    if found.batch is not None:
        parts += [Text("first row, ‹k›: anchor k; dim: not learned from", style="bold"), _row_as_text(found)]
    return Group(*parts, *(Text(f"not checked: {sentence}", style="yellow") for sentence in found.missing))


def _row_as_text(found: Preview) -> Text:
    """The tokens of the first row, decoded in pieces between anchors and changes of the target mask."""
    assert found.batch is not None
    batch, marks = found.batch, {}
    generator: Any = found.parts.training.generator
    if hasattr(generator, "anchors"):
        anchors = generator.anchors(batch, generator.rollout_len)
        counted = anchors.positions[0][anchors.mask[0]].tolist()
        marks = {position: k for k, position in enumerate(counted)}
    learned = batch.target_mask[0].tolist()
    length = int((batch.doc_ids[0] >= 0).sum())
    cuts = sorted({0, length, *marks, *(t for t in range(1, length) if learned[t] != learned[t - 1])})
    text = Text()
    for start, end in itertools.pairwise(cuts):
        if start in marks:
            text.append(f"‹{marks[start]}›", style="bold cyan")
        text.append(found.tokenizer.decode(batch.tokens[0, start:end].tolist()), style="" if learned[start] else "dim")
    return text


def step_of(found: Preview) -> Step:
    """The arithmetic's view of one micro-batch."""
    cfg = found.cfg
    generator: Any = found.parts.training.generator
    length = int(cfg.dataset.get("seq_len", found.policy.decoder.max_seq_len))
    anchors: list[int] = []
    samples, rollout_len = 0, 1
    if hasattr(generator, "anchors"):
        tokens = torch.zeros(1, length, dtype=torch.long)
        halves = torch.arange(length)[None] >= length // 2  # a prompt and a completion
        blocks = generator.anchors(Batch(tokens=tokens, doc_ids=tokens, target_mask=halves), generator.rollout_len)
        anchors, samples, rollout_len = blocks.positions[0].tolist(), generator.num_samples, generator.rollout_len
    return Step(sequences=cfg.batch_size, length=length, anchors=anchors, samples=samples, rollout_len=rollout_len)


def arithmetic_of(found: Preview) -> dict[str, float]:
    """FLOPs of a step of one rank, by phase; of the phases that it has."""
    cfg, step = found.cfg, step_of(found)
    learns = getattr(training.instantiate(cfg.loss, path="loss"), "uses_target", True)
    extractor: Any = found.parts.training.feature_extractor
    depth = len(found.policy.decoder.layers)
    deepest = max(getattr(extractor, "taps", (depth,))) / depth
    flops = flops_of(found.model_config, step, deepest_tap=deepest, ce=learns)
    if isinstance(extractor, NoFeatures):
        del flops["features"]
    if not step.anchors:
        flops = {"update": flops["update"]}
    return {phase: cfg.get("gradient_accumulation_steps", 1) * value for phase, value in flops.items()}


def memory_of(found: Preview, *, ranks: int = 1) -> Memory:
    """:func:`components.estimate.estimate_memory` of a config."""
    cfg, network = found.cfg, found.parts.network
    return estimate_memory(
        found.policy,
        step=step_of(found),
        dtype=parse_dtype(cfg.dtype),
        network=network if isinstance(network, FrozenNetwork) else None,
        reference=found.parts.reference if isinstance(found.parts.reference, nn.Module) else None,
        make_optimizer=lambda parameters: training.instantiate(cfg.optimizer, path="optimizer", params=parameters),
        ranks=ranks,
        replicate=cfg.get("data_parallel_replicate", 1),
        cpu_offload=cfg.get("cpu_offload", False) and cfg.device == "cuda",
        shard_network=getattr(network, "shard", False),
        activation_checkpointing=cfg.get("activation_checkpointing", False),
        whole_gradients=cfg.get("gradient_accumulation_steps", 1) > 1
        and not cfg.get("reduce_every_micro_batch", False),
        asynchronous_saving=cfg.checkpointer.get("asynchronous", True) and cfg.device == "cpu",
    )


def estimate(found: Preview, *, ranks: int = 1) -> Group:
    """What ``ebft estimate`` prints: parameters, arithmetic of a step by phase, memory of a rank against what is free."""
    cfg, step, memory = found.cfg, step_of(found), memory_of(found, ranks=ranks)
    parameters = list(found.policy.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    flops = arithmetic_of(found)
    rows = f"{cfg.get('gradient_accumulation_steps', 1)} x {step.sequences} rows of {step.length} tokens"
    costs = Table(title=f"one step on each of {ranks} rank(s): {rows}", title_justify="left", min_width=40)
    for heading in ("phase", "TFLOP"):
        costs.add_column(heading, justify="right" if heading == "TFLOP" else "left")
    for phase, value in (flops | {"whole step": sum(flops.values())}).items():
        costs.add_row(phase, f"{value / 1e12:.2f}")
    held = Table(title="memory of a rank, GiB", title_justify="left", show_header=False)
    held.add_column()
    held.add_column(justify="right")
    for name, value in memory.held.items():
        held.add_row(name, f"{value / GIB:.2f}")
    for phase, terms in memory.phases.items():
        held.add_row(f"besides, in {phase}", f"{sum(terms.values()) / GIB:.2f}")
        for name, value in terms.items():
            held.add_row(f"  {name}", f"{value / GIB:.2f}", style="dim")
    held.add_row("peak", f"{memory.peak / GIB:.2f}", style="bold")
    for name, value in memory.offloaded.items():
        held.add_row(f"in CPU memory: {name}", f"{value / GIB:.2f}")
    total = sum(p.numel() for p in parameters)
    free, where = _free(cfg.device)
    lines = [
        f"{total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M of them trained; {len(step.anchors)} anchors a row"
    ]
    if free is None:
        lines.append(f"no {where} here to compare the peak with")
    elif memory.peak * (ranks if cfg.device == "cpu" else 1) <= free:
        lines.append(f"it fits: {free / GIB:.1f} GiB are free on this {where}")
    else:
        lines.append(f"it does not fit: {free / GIB:.1f} GiB are free on this {where}; {_suggestion(found, memory)}")
    return Group(costs, held, *map(Text, lines))


def _free(device: str) -> tuple[float | None, str]:
    if device == "cpu":
        return psutil.virtual_memory().available, "machine"
    return (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None), "CUDA device"


def _suggestion(found: Preview, memory: Memory) -> str:
    """The cheapest remedy for the largest part."""
    cfg = found.cfg
    phases = {phase: sum(terms.values()) for phase, terms in memory.phases.items()}
    worst = max(phases, key=lambda phase: phases[phase])
    parts = {**memory.held, worst: phases[worst]}
    largest = max(parts, key=lambda name: parts[name])
    if largest == "update" and not cfg.get("activation_checkpointing", False):
        return "set activation_checkpointing to true"
    if largest in phases and cfg.batch_size > 1:
        return "lower batch_size and raise gradient_accumulation_steps as much"
    if largest == "whole gradients":
        return "set reduce_every_micro_batch to true"
    if largest == "reference":
        return "let it share the feature network (components.features.NetworkReference)"
    if largest == "feature network":
        return "set feature_extractor.network.quantization, or shard it over more processes"
    if any(p.requires_grad for p in found.policy.decoder.layers[0].attn.q_proj.parameters(recurse=False)):
        offload = "" if cfg.get("cpu_offload", False) or cfg.device == "cpu" else ", or set cpu_offload to true"
        return f"train adapters (components.models.load_lora_decoder), or use more processes{offload}"
    return "use more processes, shorter rows or a smaller model"
