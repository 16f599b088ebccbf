"""Components that tests name in YAML: uneven data, a policy of which little trains, and rewards that fail on one rank."""

import os
import signal
import time

import torch
import torch.distributed as dist

from components.models import load_decoder
from components.rewards import FeatureMatchingReward

TRAINED = ("q_proj", "v_proj")


class UnevenRows:
    """Rows of random tokens. Every second one holds no document long enough for a block, and some nothing but padding."""

    def __init__(self, *, tokenizer, seq_len):
        self.seq_len = seq_len
        self.tokens = torch.randint(0, tokenizer.vocab_size, (40, seq_len), generator=torch.Generator().manual_seed(3))
        self.fingerprint = "uneven"

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        doc_ids = torch.zeros(self.seq_len, dtype=torch.long)
        if index % 2:
            doc_ids = torch.arange(self.seq_len) // 6
        if index % 8 == 1:
            doc_ids.fill_(-1)
        elif index % 8 == 2:
            doc_ids[self.seq_len // 2 :] = -1
        return {"tokens": self.tokens[index], "doc_ids": doc_ids, "target_mask": doc_ids >= 0}


def load_mostly_frozen_decoder(checkpoint_dir: str):
    """A decoder that trains two projections of its last two layers only; the first receive no gradient at all."""
    decoder = load_decoder(checkpoint_dir).requires_grad_(False)
    for layer in decoder.layers[2:]:
        for name in TRAINED:
            getattr(layer.attn, name).requires_grad_(True)
    return decoder


class _OnRankOne(FeatureMatchingReward):
    """Calls ``happen`` on rank 1 in the second step."""

    calls = 0

    def __call__(self, batch, rollouts, features):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            self.happen()
        return super().__call__(batch, rollouts, features)


class Hangs(_OnRankOne):
    def happen(self):
        time.sleep(3600)


class Breaks(_OnRankOne):
    def happen(self):
        raise RuntimeError("a bug on one rank")


class IsKilled(_OnRankOne):
    def happen(self):
        os.kill(os.getpid(), signal.SIGKILL)
