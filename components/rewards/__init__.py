"""Rewards: how good a rollout is."""

from components.rewards.energy import FeatureMatchingReward
from components.rewards.nothing import NoReward
from components.rewards.process import Process, Result, SandboxError
from components.rewards.sandbox import Sandbox
from components.rewards.unit_tests import UnitTests
from components.rewards.verifiers import (
    ExactMatch,
    SentenceBLEU,
    SentenceChrF,
    Verifier,
    VerifierReward,
    verified,
)
from components.rewards.whitening import Whitened, Whitening, whiten

__all__ = [
    "ExactMatch",
    "FeatureMatchingReward",
    "NoReward",
    "Process",
    "Result",
    "Sandbox",
    "SandboxError",
    "SentenceBLEU",
    "SentenceChrF",
    "UnitTests",
    "Verifier",
    "VerifierReward",
    "Whitened",
    "Whitening",
    "verified",
    "whiten",
]
