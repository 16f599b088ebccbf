"""The last look before a run takes its output directory: do the parts fit together, and does the data hold any block?"""

from typing import Any

import torch

from components.data import Rows, collate
from components.training.messages import say
from components.types import Advantage, Loss, Rewards


def check_parts(*, generator: Any, advantage: Advantage, loss: Loss, reference: object | None, dataset: Rows) -> None:
    """Refuse what would only fail, or silently do nothing, once training runs; say what is worth knowing.

    Args:
        generator: of training, a ``BlockParallelGenerator``.
        advantage: tried on a reward of zeros.
        loss: for what it needs.
        reference: of the KL term, or None.
        dataset: its first rows are looked at.

    Raises:
        ValueError: greedy rollouts, a KL term without reference or a reference without it, too few samples for the
            advantage, or no block that counts.
    """
    n = generator.num_samples
    if generator.temperature <= 0:
        raise ValueError(
            "generator.temperature is 0: greedy rollouts are all alike and give no gradient; set it above 0"
        )
    if loss.uses_reference != (reference is not None):
        raise ValueError(
            "loss.kl_coef and reference are only of use together; give both (components.models.ReferencePolicy), or neither"
        )
    nothing = torch.zeros(1, n, 1)
    advantage(Rewards(pointwise=nothing, pairwise=nothing, mask=torch.ones(1, 1, dtype=torch.bool)))
    if n == 2:
        say("2 samples per anchor: with RLOO the diversity reward has no baseline (0), only alignment has one")
    batch = collate([dataset[i] for i in range(min(len(dataset), 512))])
    rows, L = batch.tokens.shape
    anchors = generator.anchors(batch, generator.rollout_len)
    if not anchors.mask.any():
        raise ValueError(
            f"no block counts in the first {rows} rows of dataset: every document (or target) is shorter than the prefix "
            "and rollout together; lower generator.anchors.context_len or generator.rollout_len, or use longer text"
        )
    say(
        f"{len(dataset)} rows of {L} tokens, {anchors.mask.shape[1]} anchors a row of which "
        f"{anchors.mask.float().mean():.0%} count, {n} samples of {generator.rollout_len} tokens at each"
    )
    ends = (anchors.positions + generator.rollout_len - 1).clamp(max=L - 1)
    straddles = batch.doc_ids.gather(1, anchors.positions - 1) != batch.doc_ids.gather(1, ends)
    if (straddles & anchors.mask).any():
        say(
            f"{straddles[anchors.mask].float().mean():.0%} of the blocks that count continue one document and are compared "
            "with another; leave them out with generator.anchors.document_mask: true"
        )
