"""The feature network as the reference of a KL term: both are the model before training, so one copy can serve as both."""

from components.features.networks import FrozenNetwork
from components.models import ReferencePolicy
from components.types import FeatureExtractor


class NetworkReference(ReferencePolicy):
    """The feature extractor's network, to its last layer and with its head.

    Args:
        extractor: the run's; the recipe gives it.

    Raises:
        ValueError: it has no network that kept its head.
    """

    def __init__(self, *, extractor: FeatureExtractor) -> None:
        network = getattr(extractor, "network", None)
        if not isinstance(network, FrozenNetwork) or not network.keep_head:
            raise ValueError(
                "the feature network has no head to score rollouts with; set feature_extractor.network.keep_head to true, "
                "or use components.models.ReferencePolicy"
            )
        super().__init__(network.decoder)
