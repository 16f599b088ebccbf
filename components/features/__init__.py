"""Features: what rollouts and ground truth look like to a frozen network."""

from components.features.average import MovingAverage
from components.features.extractor import HiddenStateFeatures
from components.features.networks import AdapterFree, FeatureNetwork, FrozenNetwork
from components.features.nothing import NoFeatures
from components.features.quantization import NF4WeightOnlyConfig
from components.features.reference import NetworkReference

__all__ = [
    "AdapterFree",
    "FeatureNetwork",
    "FrozenNetwork",
    "HiddenStateFeatures",
    "MovingAverage",
    "NF4WeightOnlyConfig",
    "NetworkReference",
    "NoFeatures",
]
