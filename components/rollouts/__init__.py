"""Rollouts: drawing the policy's own continuations. Anchors are re-exported, since YAML names them beside the generator."""

from components.blocks import CompletionAnchor, StridedAnchors
from components.rollouts.generator import BlockParallelGenerator, duplicate_share, uniforms
from components.rollouts.nothing import NoRollouts
from components.rollouts.sampling import Sampler

__all__ = [
    "BlockParallelGenerator",
    "CompletionAnchor",
    "NoRollouts",
    "Sampler",
    "StridedAnchors",
    "duplicate_share",
    "uniforms",
]
