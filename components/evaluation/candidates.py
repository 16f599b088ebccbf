"""The checkpoints that an evaluation compares: where they are, whether they belong together, and what tells them apart."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from components import training
from components.evaluation.measures import Measure, batches
from components.models import Policy, deferred_weights
from components.training.config import is_component


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint to measure.

    Attributes:
        name: its key under ``checkpoints``.
        node: how its decoder is loaded, but for ``injected``.
        injected: what the recipe adds: ``checkpoint_dir``, unless ``checkpoints`` has a node of its own for it.
        files: of its weights and configuration.
    """

    name: str
    node: DictConfig
    injected: dict[str, Any]
    files: list[Path]

    def load(self) -> Policy:
        """The policy, its weights deferred."""
        with deferred_weights():
            return Policy(training.instantiate(self.node, path=f"checkpoints.{self.name}", **self.injected))

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all its files and of how they are loaded. Reads them all."""
        options = {key: value for key, value in training.plain_values(self.node).items() if not _is_path(value)}
        digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
        for path in self.files:
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
        return digest.hexdigest()


def find_candidates(cfg: DictConfig) -> list[Candidate]:
    """The checkpoints of a config, in its order.

    Each is a Hugging Face directory, a run's ``output_dir`` (its newest checkpoint is taken), or, like ``model``, a node of its
    own that loads a decoder, such as one with adapters.

    Raises:
        ValueError: a directory that is missing, or is neither.
    """
    candidates = []
    for name, value in cfg.checkpoints.items():
        if is_component(value):
            plain = training.plain_values(value)
            places = [Path(item) for item in plain.values() if _is_path(item)]
            candidates.append(Candidate(name=name, node=value, injected={}, files=_files(places)))
            continue
        if not isinstance(value, str):
            raise ValueError(f"checkpoints.{name} is {value!r}; name a directory, or write a node that loads a decoder")
        if "model" not in cfg:
            raise ValueError(f"model: this key is missing; add it, to say how checkpoints.{name} is loaded")
        directory = _model_directory(name, Path(value))
        candidates.append(
            Candidate(name=name, node=cfg.model, injected={"checkpoint_dir": str(directory)}, files=_files([directory]))
        )
    return candidates


def _model_directory(name: str, directory: Path) -> Path:
    if not directory.is_dir():
        raise ValueError(f"checkpoints.{name}: there is no directory '{directory}'; correct the path")
    if saved := training.list_checkpoints(directory):
        directory = saved[-1]
    if (directory / "config.json").is_file():
        return directory
    adapters = next(
        (path for path in (directory / "adapter", directory) if (path / "adapter_config.json").is_file()), None
    )
    if adapters is not None:
        raise ValueError(
            f"checkpoints.{name}: '{directory}' holds adapters alone; write a node with components.models.load_lora_decoder, "
            f"its base as checkpoint_dir, and adapter_dir: {adapters}"
        )
    raise ValueError(
        f"checkpoints.{name}: '{directory}' is neither a Hugging Face directory (no config.json) nor a run with a complete "
        "checkpoint; correct the path"
    )


def _files(places: list[Path]) -> list[Path]:
    """What a decoder is made from: of directories, configurations and weights."""
    inside = [
        file
        for place in places
        for pattern in ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
        for file in sorted(place.glob(pattern))
    ]
    return inside + [place for place in places if place.is_file()]


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).exists()


def check_candidates(candidates: list[Candidate], measures: Mapping[str, Measure], vocab_size: int) -> None:
    """Build every checkpoint's decoder without its weights and compare them, before the first of them is measured.

    Args:
        candidates: the checkpoints.
        measures: for how far they have to read.
        vocab_size: of the tokenizer.

    Raises:
        ValueError: too few rows; a checkpoint that cannot be loaded, has another vocabulary, or reads less far than a measure
            asks.
    """
    for name, measure in measures.items():
        batches(measure, name)
    vocabularies: dict[str, Any] = {}
    for candidate in candidates:
        policy = candidate.load()
        size = policy.decoder.tok_embeddings.num_embeddings
        if vocab_size > size:
            raise ValueError(
                f"checkpoints.{candidate.name} has {size} tokens and the tokenizer {vocab_size}: all must come from one model"
            )
        vocabularies[candidate.name] = _vocabulary(candidate)
        for name, measure in measures.items():
            if measure.reach > policy.decoder.max_seq_len:
                raise ValueError(
                    f"measures.{name} reaches position {measure.reach}, and checkpoints.{candidate.name} reads "
                    f"{policy.decoder.max_seq_len}; shorten the rows or generator.rollout_len"
                )
    (first, vocabulary), *others = [(name, each) for name, each in vocabularies.items() if each is not None] or [
        ("", None)
    ]
    for name, other in others:
        if other != vocabulary:
            raise ValueError(
                f"checkpoints.{name} has another vocabulary than checkpoints.{first} (tokenizer.json): all must come from one "
                "model"
            )


def _vocabulary(candidate: Candidate) -> Any:
    """The token ids of a checkpoint's ``tokenizer.json``; None if there is none beside its weights."""
    for directory in dict.fromkeys(path.parent for path in candidate.files):
        path = directory / "tokenizer.json"
        if path.is_file():
            return json.loads(path.read_text())["model"]["vocab"]
    return None
