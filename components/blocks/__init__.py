"""Which token sees which: anchors, the packed order, attention over it, and the cache of a rollout."""

from components.blocks.anchors import Anchors, AnchorSet, CompletionAnchor, StridedAnchors
from components.blocks.attention import (
    AttentionPattern,
    DecodeAttention,
    PackedAttention,
    PrefillAttention,
    flex_mask,
    install,
)
from components.blocks.cache import KVCache
from components.blocks.layout import PackedLayout, target_windows

__all__ = [
    "AnchorSet",
    "Anchors",
    "AttentionPattern",
    "CompletionAnchor",
    "DecodeAttention",
    "KVCache",
    "PackedAttention",
    "PackedLayout",
    "PrefillAttention",
    "StridedAnchors",
    "flex_mask",
    "install",
    "target_windows",
]
