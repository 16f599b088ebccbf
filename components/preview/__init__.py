"""A config looked at before it runs: ``ebft validate`` and ``ebft estimate``."""

from components.preview.build import Preview, preview
from components.preview.costs import arithmetic_of, estimate, memory_of, step_of
from components.preview.text import show

__all__ = ["Preview", "arithmetic_of", "estimate", "memory_of", "preview", "show", "step_of"]
