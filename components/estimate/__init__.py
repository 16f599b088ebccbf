"""What a step costs before it is run: arithmetic and memory, by formula."""

from components.estimate.flops import Step, flops_of, obvious_flops
from components.estimate.memory import GIB, NF4, Memory, estimate_memory, held_bytes

__all__ = ["GIB", "NF4", "Memory", "Step", "estimate_memory", "flops_of", "held_bytes", "obvious_flops"]
