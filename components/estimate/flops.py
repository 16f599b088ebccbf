"""The arithmetic of one step, by formula: floating-point operations per phase, a multiplication with its addition being two.

Counted are matrix products and attention scores that some output depends on, each once per pass (a backward is two passes);
norms, activations, softmax and whatever an implementation does twice are not. ``docs/performance.md`` writes the same
formulas out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step reads and draws: ``B`` sequences of ``L`` tokens, ``n`` samples of ``G`` tokens at ``K`` anchors each.

    Attributes:
        sequences: ``B``.
        length: ``L``.
        anchors: positions of the ``K`` blocks of a sequence.
        samples: ``n``.
        rollout_len: ``G``.
    """

    sequences: int = 1
    length: int
    anchors: Sequence[int]
    samples: int = 4
    rollout_len: int = 8

    @property
    def packed_tokens(self) -> int:
        """Tokens that the update reads for one sequence; a block's last token predicts nothing."""
        return self.length + self.samples * len(self.anchors) * (self.rollout_len - 1)


class Model:
    """Sizes of a Hugging Face ``config``, as multiplications per token, pair and row."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or width // heads
        kv_heads = config.get("num_key_value_heads") or heads
        self.depth = config["num_hidden_layers"]
        attention = width * head_dim * (2 * heads + 2 * kv_heads)
        self.layer = 2 * (attention + 3 * width * config["intermediate_size"])  # per token
        self.pair = 4 * heads * head_dim  # per query and key that it sees, per layer
        self.head = 2 * width * config["vocab_size"]  # per row of logits


def flops_of(config: Mapping[str, Any], step: Step, *, deepest_tap: float = 0.75, ce: bool = False) -> dict[str, float]:
    """FLOPs that the method needs: every token once, no key that is not seen, phi up to its deepest tap."""
    model, anchors, n, G, L = Model(config), step.anchors, step.samples, step.rollout_len, step.length

    def packed(block_len: int, depth: int) -> float:
        prompt = L * (L + 1) / 2
        blocks = sum(n * (block_len * anchor + block_len * (block_len + 1) / 2) for anchor in anchors)
        tokens = L + n * len(anchors) * block_len
        return depth * (tokens * model.layer + (prompt + blocks) * model.pair)

    rows = len(anchors) * (1 + n * (G - 1))
    target_passes = 3 if ce else 1  # log-probs of the ground truth are logged even where they are not trained on
    per_sequence = {
        "rollouts": packed(G - 1, model.depth) + rows * model.head,
        "features": packed(G, int(deepest_tap * model.depth)),
        "update": 3 * (packed(G - 1, model.depth) + rows * model.head) + target_passes * (L - 1) * model.head,
    }
    return {phase: step.sequences * flops for phase, flops in per_sequence.items()}


def obvious_flops(config: Mapping[str, Any], step: Step) -> dict[str, float]:
    """FLOPs of the straightforward way: the prompt once per sample, everything again for every token, all pairs, all logits."""
    model, K, n, G, L = Model(config), len(step.anchors), step.samples, step.rollout_len, step.length

    def whole(block_len: int) -> float:
        tokens = L + K * block_len
        return n * (model.depth * (tokens * model.layer + tokens**2 * model.pair) + tokens * model.head)

    per_sequence = {
        "rollouts": sum(whole(drawn) for drawn in range(G)),
        "features": whole(G),
        "update": 3 * whole(G),
    }
    return {phase: step.sequences * flops for phase, flops in per_sequence.items()}
