"""The feature network as the reference of a KL term: both are the model before training, so one copy can serve as both."""

import torch
from torch import Tensor

from components.features.networks import AdapterFree, FrozenNetwork
from components.models import Policy, adapters_disabled
from components.types import Batch, FeatureExtractor, Rollouts


class NetworkReference:
    """The feature extractor's network, to its last layer and with its head.

    Args:
        extractor: the run's; the recipe gives it.

    Raises:
        ValueError: its network is neither a ``FrozenNetwork`` that kept its head nor ``AdapterFree``.
    """

    def __init__(self, *, extractor: FeatureExtractor) -> None:
        network = getattr(extractor, "network", None)
        if isinstance(network, AdapterFree):
            self.policy = network.policy
        elif isinstance(network, FrozenNetwork) and network.keep_head:
            self.policy = Policy(network.decoder)
        else:
            raise ValueError(
                "the feature network has no head to score rollouts with; set feature_extractor.network.keep_head to true, "
                "or use components.models.ReferencePolicy"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch, rollouts: Rollouts, temperature: float) -> Tensor:
        """Log-probs of the rollout tokens, ``[B, n, K, G]`` float32; see ``components.models.Policy``."""
        with adapters_disabled(self.policy):
            return self.policy(batch, rollouts, temperature=temperature).rollout
