"""Rewards: how good a rollout is."""

from components.rewards.energy import FeatureMatchingReward
from components.rewards.nothing import NoReward
from components.rewards.whitening import Whitened, Whitening, whiten

__all__ = ["FeatureMatchingReward", "NoReward", "Whitened", "Whitening", "whiten"]
