"""A run looked at before it starts: its parts on the meta device, its first batch as text, its arithmetic and its memory.

Everything is built by the recipe's own functions from the recipe's own config; only weights are left out. A checkpoint that is
not here yet is stood in for by its shape, if its directory is named after a model that is known.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from components import training
from components.data import NotHere, Rows, StreamedText, Tokenizer, collate, first_rows
from components.features import MovingAverage
from components.models import Policy, deferred_weights, known_config, read_config, write_stand_in
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
    with training.naming_file(cfg):
        training.check_recipe(cfg)
    with tempfile.TemporaryDirectory() as folder:
        missing = _stand_in(cfg, Path(folder))
        training.start("cpu")
        try:
            with training.naming_file(cfg):
                found = _build(cfg, missing)
            yield found
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
    _build_rest(cfg, policy)
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


def _build_rest(cfg: DictConfig, policy: Policy) -> None:
    """What needs no weights to be refused: optimizer, schedule and checkpointer."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    training.instantiate(cfg.optimizer, path="optimizer", kind=training.Optimizer, params=trained)
    training.rehearse(cfg, max_steps=cfg.get("max_steps", 100))
    training.instantiate(
        cfg.checkpointer,
        path="checkpointer",
        kind=training.Checkpointer,
        output_dir=cfg.output_dir,
        keep_last=cfg.get("keep_last", 1),
    )
