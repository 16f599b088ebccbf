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


def write_checkpoint(directory: Path, **changes: object) -> Path:
    """A random llama with a byte-level tokenizer that fits it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "bos_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    settings = {"vocab_size": tokenizer.get_vocab_size(), "eos_token_id": 0, "architectures": ["LlamaForCausalLM"]}
    config = tiny_config(**(settings | changes))
    (directory / "config.json").write_text(json.dumps(config))
    weights = tiny_decoder(**(settings | changes)).state_dict()
    save_file(to_hf(weights, config), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
