"""Features: against one row per block, poolings by their definition, and what must not matter."""

import pytest
import torch
import torch.nn.functional as F

from components.features import FrozenNetwork, HiddenStateFeatures
from components.types import Batch, Rollouts
from tests.tiny import tiny_batch, tiny_decoder, tiny_rollouts

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def extract(decoder, batch, rollouts, **options):
    return HiddenStateFeatures(network=FrozenNetwork(decoder), **options)(batch, rollouts)


def with_mask(rollouts, mask):
    return Rollouts(tokens=rollouts.tokens, mask=mask, anchors=rollouts.anchors, logprobs=rollouts.logprobs)


@torch.no_grad()
def states_row_by_row(decoder, tokens, taps):
    """``[len(tokens), layers * width]``: torchtune's own hidden states of one row (input of layer i = after layer i)."""
    decoder.output_hidden_states = list(taps)
    *hidden, _ = decoder(tokens[None])
    decoder.output_hidden_states = []
    return F.normalize(torch.cat([h[0] for h in hidden], dim=-1), dim=-1)


def test_features_are_those_of_one_row_per_block():
    """Rollouts and ground truth, behind the same prefix of the same document."""
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch, document_mask=True)
    got = extract(decoder, batch, rollouts, pooling="mean")
    for b, k in rollouts.mask.any(-1).any(1).nonzero().tolist():
        a = int(rollouts.anchors[b, k])
        first = int((batch.doc_ids[b] == batch.doc_ids[b, a - 1]).nonzero()[0])
        prefix = batch.tokens[b, first:a]
        for j in range(3):
            rows = states_row_by_row(decoder, torch.cat((prefix, rollouts.tokens[b, j, k])), (1, 2, 3))
            torch.testing.assert_close(got.rollout[b, j, k], rows[-4:].mean(dim=0), **CLOSE)
        rows = states_row_by_row(decoder, torch.cat((prefix, batch.tokens[b, a : a + 4])), (1, 2, 3))
        torch.testing.assert_close(got.target[b, k], rows[-4:].mean(dim=0), **CLOSE)


def test_a_rollout_equal_to_the_ground_truth_has_its_features():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch, document_mask=True)
    window = rollouts.anchors[:, :, None] + torch.arange(4)
    truth = batch.tokens.gather(1, window.flatten(1)).view(window.shape)
    copied = Rollouts(
        tokens=truth[:, None].expand(rollouts.tokens.shape).clone(),
        mask=rollouts.mask,
        anchors=rollouts.anchors,
        logprobs=rollouts.logprobs,
    )
    for pooling in ("last_token", "mean", "concat"):
        got = extract(decoder, batch, copied, pooling=pooling)
        counted = got.mask
        target = got.target[:, None].expand_as(got.rollout)
        for j in range(3):
            torch.testing.assert_close(got.rollout[:, j][counted], target[:, j][counted], **CLOSE)


def test_poolings_are_three_readings_of_the_same_tokens():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch)
    tokens = extract(decoder, batch, rollouts, pooling="concat").rollout.unflatten(-1, (4, -1))
    torch.testing.assert_close(extract(decoder, batch, rollouts, pooling="mean").rollout, tokens.mean(dim=-2))
    torch.testing.assert_close(extract(decoder, batch, rollouts).rollout, tokens[..., -1, :])


def test_tokens_after_a_stop_are_not_read():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch)
    mask = rollouts.mask.clone()
    mask[:, :, :, 2:] = False
    stopped = with_mask(rollouts, mask)
    tokens = extract(decoder, batch, rollouts, pooling="concat").rollout.unflatten(-1, (4, -1))
    torch.testing.assert_close(extract(decoder, batch, stopped).rollout, tokens[..., 1, :])
    torch.testing.assert_close(
        extract(decoder, batch, stopped, pooling="mean").rollout, tokens[..., :2, :].mean(dim=-2)
    )
    cut = extract(decoder, batch, stopped, pooling="concat").rollout.unflatten(-1, (4, -1))
    torch.testing.assert_close(cut[..., :2, :], tokens[..., :2, :])
    assert not cut[..., 2:, :].any()


def test_a_target_ends_with_its_text():
    """A window that runs past the row is pooled over what there is of it."""
    decoder, batch = tiny_decoder(), tiny_batch(B=1, documents=((20,),))
    tokens = torch.zeros(1, 1, 1, 6, dtype=torch.long)
    rollouts = Rollouts(
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        anchors=torch.tensor([[17]]),
        logprobs=torch.zeros(tokens.shape),
    )
    got = extract(decoder, batch, rollouts, pooling="mean").target[0, 0]
    expected = states_row_by_row(decoder, batch.tokens[0, :20], (1, 2, 3))[17:20].mean(dim=0)
    torch.testing.assert_close(got, expected, **CLOSE)


@pytest.mark.parametrize("combine", ["concat", "mean", "stack"])
@pytest.mark.parametrize("norm", ["joint", "per_layer"])
def test_token_features_have_unit_length(combine, norm):
    decoder, batch = tiny_decoder(), tiny_batch()
    got = extract(decoder, batch, tiny_rollouts(batch), combine=combine, norm=norm).rollout
    if (combine, norm) == ("mean", "per_layer"):
        assert (got.norm(dim=-1) <= 1 + 1e-5).all()  # a mean of unit vectors is shorter
    else:
        torch.testing.assert_close(got.norm(dim=-1), torch.ones(got.shape[:-1]))


def test_per_layer_and_joint_norm_differ_in_the_layers_weights_only():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch)
    joint = extract(decoder, batch, rollouts).rollout.unflatten(-1, (3, -1))
    apart = extract(decoder, batch, rollouts, norm="per_layer").rollout.unflatten(-1, (3, -1))
    torch.testing.assert_close(F.normalize(joint, dim=-1), F.normalize(apart, dim=-1))
    torch.testing.assert_close(apart.norm(dim=-1), torch.full(apart.shape[:-1], 3**-0.5))


@pytest.mark.parametrize(
    ("layers", "taps"),
    [([0.25, 0.5, 0.75], (1, 2, 3)), ([2], (2,)), ([4, 1], (1, 4)), ([0.5, 2], (2,)), ([0.99], (3,))],
)
def test_layers_by_fraction_or_number(layers, taps):
    extractor = HiddenStateFeatures(network=FrozenNetwork(tiny_decoder()), layers=layers)
    assert extractor.taps == taps
    assert len(extractor.network.decoder.layers) == taps[-1]  # nothing past the deepest tap is kept


def test_smollm2_is_tapped_after_layers_7_15_and_22():
    extractor = HiddenStateFeatures(network=FrozenNetwork(tiny_decoder(num_hidden_layers=30)))
    assert extractor.taps == (7, 15, 22)


@pytest.mark.parametrize("layers", [[], [0], [5], [-0.5], [0.1], [1.5]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="layers"):
        HiddenStateFeatures(network=FrozenNetwork(tiny_decoder()), layers=layers)


@pytest.mark.parametrize("option", ["combine", "pooling", "norm"])
def test_unknown_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 'typo'"):
        HiddenStateFeatures(network=FrozenNetwork(tiny_decoder()), **{option: "typo"})


def test_the_network_is_a_copy_without_gradients():
    decoder, batch = tiny_decoder(), tiny_batch()
    network = FrozenNetwork(decoder)
    rollouts = tiny_rollouts(batch)
    before = HiddenStateFeatures(network=network)(batch, rollouts)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    after = HiddenStateFeatures(network=network)(batch, rollouts)
    assert torch.equal(after.rollout, before.rollout)
    assert len(decoder.layers) == 4  # cutting the copy left the original whole
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not after.rollout.requires_grad


def test_a_block_counts_where_any_of_its_tokens_does():
    batch = tiny_batch(B=1, documents=((10, 8, 6),))
    rollouts = tiny_rollouts(batch, document_mask=True)
    got = extract(tiny_decoder(), batch, rollouts)
    assert torch.equal(got.mask, rollouts.mask[:, 0, :, 0])


def test_features_that_are_not_numbers_are_named():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch)
    with torch.no_grad():
        decoder.tok_embeddings.weight[int(rollouts.tokens[1, 2, 3, 3])] = torch.inf
        tokens = torch.full_like(rollouts.tokens, int((rollouts.tokens[1, 2, 3, 3] + 1) % 61))
    tokens[1, 2, 3, 3] = rollouts.tokens[1, 2, 3, 3]
    quiet = Batch(
        tokens=torch.where(batch.tokens == tokens[1, 2, 3, 3], 0, batch.tokens),
        doc_ids=batch.doc_ids,
        target_mask=batch.target_mask,
    )
    broken = Rollouts(tokens=tokens, mask=rollouts.mask, anchors=rollouts.anchors, logprobs=rollouts.logprobs)
    with pytest.raises(FloatingPointError, match="non-finite rollout features at sequence 1, block 3"):
        extract(decoder, quiet, broken)
