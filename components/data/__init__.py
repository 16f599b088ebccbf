"""Data: from text to batches. ``load_text`` and ``PackedText`` are named in YAML, as is the tokenizer."""

from components.data.loader import Rows, TrainStream, batch_loader, collate
from components.data.packing import PackedText
from components.data.sources import load_text
from components.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "HFTokenizer",
    "PackedText",
    "Rows",
    "Tokenizer",
    "TrainStream",
    "batch_loader",
    "collate",
    "load_text",
    "load_tokenizer",
]
