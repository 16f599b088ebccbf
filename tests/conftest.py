"""Fixtures for all tests: tiny, made in the process, offline."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import settings
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from components.rewards import Sandbox

# Tiny models gain nothing from more threads, and lose much where other processes want them.
torch.set_num_threads(1)

# Time is measured in benchmarks/. The profile is otherwise hypothesis' own: that of CI tries the same examples every time.
settings.register_profile("untimed", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("untimed")


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A Hugging Face directory with only a tokenizer: ids 0 ``<bos>``, 1 ``<eos>``, then one for each of the 256 bytes.

    Like Llama's, its post-processor puts a BOS before every text.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 + len(alphabet), special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}))
    return folder


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """A sandbox with tight limits. Its odd memory limit shows in its processes' command lines."""
    if shutil.which("bwrap") is None and "CI" not in os.environ:
        pytest.skip("generated code runs isolated only: install the package bubblewrap")
    return Sandbox(wall_seconds=5, cpu_seconds=1, memory_mb=random.randrange(256, 512), workers=2)
