"""Features: what rollouts and ground truth look like to a frozen network."""

from components.features.extractor import HiddenStateFeatures
from components.features.networks import FeatureNetwork, FrozenNetwork
from components.features.reference import NetworkReference

__all__ = ["FeatureNetwork", "FrozenNetwork", "HiddenStateFeatures", "NetworkReference"]
