"""Data: from text and records to batches. Datasets, what they read, and the tokenizer are named in YAML."""

from components.data.chat import ChatTemplate
from components.data.loader import TrainStream, batch_loader, first_rows, train_stream
from components.data.packing import PackedText
from components.data.prompts import PromptCompletion
from components.data.rows import Rows, collate
from components.data.sources import NotHere, load_records, load_text, stream_text
from components.data.splits import split_by_group
from components.data.streaming import StreamedBatches, StreamedText
from components.data.tokenizer import HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "ChatTemplate",
    "HFTokenizer",
    "NotHere",
    "PackedText",
    "PromptCompletion",
    "Rows",
    "StreamedBatches",
    "StreamedText",
    "Tokenizer",
    "TrainStream",
    "batch_loader",
    "collate",
    "first_rows",
    "load_records",
    "load_text",
    "load_tokenizer",
    "split_by_group",
    "stream_text",
    "train_stream",
]
