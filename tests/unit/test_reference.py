"""References: log-probs against one row per block, and one network that serves features and reference."""

import pytest
import torch

from components.features import FrozenNetwork, HiddenStateFeatures, NetworkReference
from components.models import ReferencePolicy
from tests.tiny import row_by_row, tiny_batch, tiny_decoder, tiny_rollouts


@pytest.mark.parametrize(
    "family", ["llama", "mistral"]
)  # with the head tied to the embeddings, and with one of its own
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_log_probs_are_those_of_one_row_per_block_at_the_temperature(kind, family):
    decoder, batch = tiny_decoder(family=family), tiny_batch()
    rollouts = tiny_rollouts(batch, document_mask=True)
    expected = row_by_row(decoder, batch, rollouts, temperature=0.6)
    if kind == "own":
        reference = ReferencePolicy(decoder)
    else:
        reference = NetworkReference(extractor=HiddenStateFeatures(network=FrozenNetwork(decoder, keep_head=True)))
    got = reference(batch, rollouts, temperature=0.6)
    assert not got.requires_grad
    torch.testing.assert_close(got[rollouts.mask], expected[rollouts.mask], atol=2e-5, rtol=1e-5)


def test_a_kept_head_changes_no_feature():
    decoder, batch = tiny_decoder(), tiny_batch()
    rollouts = tiny_rollouts(batch)
    cut, whole = (
        HiddenStateFeatures(network=FrozenNetwork(decoder, keep_head=keep))(batch, rollouts) for keep in (False, True)
    )
    assert torch.equal(whole.rollout, cut.rollout)
    assert torch.equal(whole.target, cut.target)


def test_nothing_of_a_reference_can_be_trained():
    assert not any(parameter.requires_grad for parameter in ReferencePolicy(tiny_decoder()).parameters())


@pytest.mark.parametrize("extractor", [HiddenStateFeatures(network=FrozenNetwork(tiny_decoder())), object()])
def test_a_network_without_a_head_is_no_reference(extractor):
    with pytest.raises(ValueError, match="set feature_extractor.network.keep_head to true"):
        NetworkReference(extractor=extractor)
