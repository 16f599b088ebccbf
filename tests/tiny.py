"""Tiny models and batches, built in process, and the slow obvious twins of what the package does fast."""

import torch
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor

from components.blocks import StridedAnchors
from components.models import build_decoder
from components.types import Batch, Rollouts

VOCAB = 61


def tiny_config(family="llama", **changes):
    """``config.json`` of a four-layer model with grouped key/value heads."""
    config = {
        "model_type": family,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": family != "mistral",
    }
    return config | changes


def tiny_decoder(seed=0, dtype=torch.float32, **changes):
    """Weights wide enough that its predictions differ from uniform and attention matters."""
    torch.manual_seed(seed)
    decoder = build_decoder(tiny_config(**changes))
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return decoder.to(dtype)


def tiny_batch(B=2, L=24, documents=((24,), (10, 8, 6)), seed=1):
    """Rows of random tokens; ``documents`` are their lengths, row by row; what they leave of ``L`` is padding."""
    generator = torch.Generator().manual_seed(seed)
    doc_ids = torch.full((B, L), -1)
    for row in range(B):
        start = 0
        for number, length in enumerate(documents[row % len(documents)]):
            doc_ids[row, start : start + length] = number
            start += length
    tokens = torch.randint(0, VOCAB, (B, L), generator=generator)
    return Batch(tokens=tokens, doc_ids=doc_ids, target_mask=doc_ids >= 0)


def tiny_rollouts(batch, n=3, G=4, stride=3, context_len=2, seed=2, **options):
    """Random tokens at strided anchors."""
    anchors = StridedAnchors(stride=stride, context_len=context_len, **options)(batch, G)
    generator = torch.Generator().manual_seed(seed)
    B, K = anchors.positions.shape
    tokens = torch.randint(0, VOCAB, (B, n, K, G), generator=generator)
    return Rollouts(
        tokens=tokens,
        mask=anchors.mask[:, None, :, None].expand(tokens.shape),
        anchors=anchors.positions,
        logprobs=torch.zeros(tokens.shape),
    )


def row_by_row(decoder, batch, rollouts, temperature):
    """Log-probs ``[B, n, K, G]``: torchtune's own causal forward, one row per (sequence, sample, block)."""
    B, n, K, G = rollouts.tokens.shape
    out = torch.zeros(B, n, K, G)
    for b in range(B):
        for k in range(K):
            a = int(rollouts.anchors[b, k])
            first = int((batch.doc_ids[b] == batch.doc_ids[b, a - 1]).nonzero()[0])
            for j in range(n):
                row = torch.cat((batch.tokens[b, first:a], rollouts.tokens[b, j, k]))
                logprobs = (decoder(row[None])[0, :-1] / temperature).log_softmax(dim=-1)
                out[b, j, k] = logprobs.gather(1, row[1:, None])[-G:, 0]
    return out


def target_row_by_row(decoder, batch):
    """Log-probs ``[B, L-1]`` of the ground truth, one document at a time (0 for a document's first token)."""
    B, L = batch.tokens.shape
    out = torch.zeros(B, L - 1)
    for b in range(B):
        for document in batch.doc_ids[b].unique():
            index = (batch.doc_ids[b] == document).nonzero()[:, 0]
            row = batch.tokens[b, index]
            logprobs = decoder(row[None])[0, :-1].log_softmax(dim=-1)
            out[b, index[1:] - 1] = logprobs.gather(1, row[1:, None])[:, 0]
    return out


def whole(value):
    """A copy of a tensor, gathered if it is sharded, as numbers if it is held in 4 bits."""
    if isinstance(value, NF4Tensor):
        return value.get_original_weight()
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
