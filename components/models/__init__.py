"""Models: Hugging Face directory -> torchtune decoder -> policy."""

from components.models.decoder import (
    build_decoder,
    from_hf,
    hidden_states,
    load_decoder,
    parse_dtype,
    read_config,
    read_weights,
    to_hf,
)
from components.models.policy import Draw, Drawn, Policy
from components.models.reference import ReferencePolicy

__all__ = [
    "Draw",
    "Drawn",
    "Policy",
    "ReferencePolicy",
    "build_decoder",
    "from_hf",
    "hidden_states",
    "load_decoder",
    "parse_dtype",
    "read_config",
    "read_weights",
    "to_hf",
]
