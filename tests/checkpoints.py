"""A tiny Hugging Face directory (weights, config, tokenizer) and a corpus, made in process for recipe runs."""

import json
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.models import to_hf
from tests.tiny import tiny_config, tiny_decoder

LINES = [f"def f{i}(x, y):\n    z = x * {i} + y\n    return [z for _ in range({i % 7})]\n" for i in range(200)]


def write_corpus(directory: Path, documents: int = 120) -> Path:
    """Documents of a few lines of code, one per JSON line."""
    path = Path(directory) / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "".join(LINES[i % 200 :][:3])}) + "\n" for i in range(documents)))
    return path


def write_model(directory: Path, **changes: object) -> dict:
    """The model of ``tests.tiny`` as a Hugging Face directory; its ``config.json``."""
    config = tiny_config(**changes)
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / "config.json").write_text(json.dumps(config))
    weights = to_hf(tiny_decoder(**changes).state_dict(), config)
    save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})
    return config


def write_checkpoint(directory: Path, *, eos: str = "<eos>", **changes: object) -> Path:
    """A random llama with a byte-level tokenizer that fits it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    settings = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0, "architectures": ["LlamaForCausalLM"]}
    write_model(directory, **(settings | changes))
    return directory
