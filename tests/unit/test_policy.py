"""The packed forward against the obvious one: a row per sample and block, gradients included (float32)."""

import pytest
import torch

from components.losses import learned_tokens
from components.models import Policy
from tests.tiny import row_by_row, target_row_by_row, tiny_batch, tiny_decoder, tiny_rollouts

# Sums over the same numbers in another order: float32 rounding of values around 10.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("G", [1, 2, 5])
def test_packed_logprobs_are_those_of_one_row_per_block(family, G):
    decoder = tiny_decoder(family=family)
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch, G=G)
    packed = Policy(decoder)(batch, rollouts, temperature=0.7, with_target=True)
    torch.testing.assert_close(packed.rollout, row_by_row(decoder, batch, rollouts, 0.7), **CLOSE)
    learned, expected = learned_tokens(batch), target_row_by_row(decoder, batch)
    torch.testing.assert_close(packed.target[learned], expected[learned], **CLOSE)


def test_packed_gradients_are_those_of_one_row_per_block():
    decoder = tiny_decoder()
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    weight = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(3))

    (row_by_row(decoder, batch, rollouts, 0.7) * weight).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in decoder.named_parameters()}
    decoder.zero_grad()
    (Policy(decoder)(batch, rollouts, temperature=0.7).rollout * weight).sum().backward()
    for name, parameter in decoder.named_parameters():
        scale = expected[name].abs().max()
        torch.testing.assert_close(parameter.grad / scale, expected[name] / scale, atol=2e-5, rtol=0, msg=name)


def test_anchors_may_differ_between_rows():
    """What CompletionAnchor and target regions need: no path assumes one set of anchors for the batch."""
    decoder = tiny_decoder()
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    anchors = rollouts.anchors.clone()
    anchors[1] = torch.randint(1, 24, anchors[1].shape, generator=torch.Generator().manual_seed(4))
    rollouts = type(rollouts)(tokens=rollouts.tokens, mask=rollouts.mask, anchors=anchors, logprobs=rollouts.logprobs)
    packed = Policy(decoder)(batch, rollouts, temperature=1.0)
    torch.testing.assert_close(packed.rollout, row_by_row(decoder, batch, rollouts, 1.0), **CLOSE)


def test_samples_scored_at_once_are_samples_scored_alone():
    policy = Policy(tiny_decoder())
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    together = policy(batch, rollouts, temperature=0.6).rollout
    for j in range(rollouts.tokens.shape[1]):
        alone = type(rollouts)(
            tokens=rollouts.tokens[:, j : j + 1],
            mask=rollouts.mask[:, j : j + 1],
            anchors=rollouts.anchors,
            logprobs=rollouts.logprobs[:, j : j + 1],
        )
        torch.testing.assert_close(policy(batch, alone, temperature=0.6).rollout[:, 0], together[:, j], **CLOSE)


def test_changing_a_token_of_one_block_changes_no_other_block():
    policy = Policy(tiny_decoder())
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    before = policy(batch, rollouts, temperature=1.0, with_target=True)
    _, n, K, G = rollouts.tokens.shape
    for j in range(n):
        for k in range(K):
            tokens = rollouts.tokens.clone()
            tokens[:, j, k, 1] = (tokens[:, j, k, 1] + 1) % 61
            changed = type(rollouts)(
                tokens=tokens, mask=rollouts.mask, anchors=rollouts.anchors, logprobs=rollouts.logprobs
            )
            after = policy(batch, changed, temperature=1.0, with_target=True)
            same = (after.rollout == before.rollout).all(dim=-1)
            assert not same[:, j, k].any()
            same[:, j, k] = True
            assert same.all()
            assert torch.equal(after.target, before.target)


def test_changing_a_token_of_one_document_changes_no_other_document():
    policy = Policy(tiny_decoder())
    batch = tiny_batch(B=1, documents=((10, 8, 6),))
    rollouts = tiny_rollouts(batch)
    before = policy(batch, rollouts, temperature=1.0, with_target=True)
    for position in range(24):
        tokens = batch.tokens.clone()
        tokens[0, position] = (tokens[0, position] + 1) % 61
        changed = type(batch)(tokens=tokens, doc_ids=batch.doc_ids, target_mask=batch.target_mask)
        after = policy(changed, rollouts, temperature=1.0, with_target=True)
        other_prefix = batch.doc_ids.gather(1, rollouts.anchors - 1) != batch.doc_ids[0, position]  # [B, K]
        assert torch.equal(after.rollout.transpose(1, 2)[other_prefix], before.rollout.transpose(1, 2)[other_prefix])
        other = learned_tokens(batch) & (batch.doc_ids[:, 1:] != batch.doc_ids[0, position])
        assert torch.equal(after.target[other], before.target[other])


def test_temperature_divides_the_logits():
    decoder = tiny_decoder()
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    torch.testing.assert_close(
        Policy(decoder)(batch, rollouts, temperature=0.3).rollout, row_by_row(decoder, batch, rollouts, 0.3), **CLOSE
    )


def test_a_temperature_of_zero_has_no_logprobs():
    batch = tiny_batch()
    with pytest.raises(ValueError, match="temperature 0"):
        Policy(tiny_decoder())(batch, tiny_rollouts(batch), temperature=0)


def test_bf16_logprobs_stay_close_to_float32():
    """bfloat16 weights and activations keep 8 bits; the head is float32, so no more is lost there."""
    batch = tiny_batch()
    rollouts = tiny_rollouts(batch)
    exact = Policy(tiny_decoder())(batch, rollouts, temperature=1.0).rollout
    rounded = Policy(tiny_decoder(dtype=torch.bfloat16))(batch, rollouts, temperature=1.0).rollout
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1
