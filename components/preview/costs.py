"""What ``ebft estimate`` prints: the arithmetic and the memory of a step of a config, and what to do if it does not fit."""

from typing import Any

import psutil
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn

from components import training
from components.estimate import GIB, Memory, Step, estimate_memory, flops_of
from components.features import FrozenNetwork, NoFeatures
from components.models import parse_dtype
from components.preview.build import Preview
from components.types import Batch


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
