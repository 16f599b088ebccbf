"""Models: Hugging Face directory -> torchtune decoder -> policy."""

from components.models.decoder import build_decoder, from_hf, hidden_states, parse_dtype, read_config, to_hf
from components.models.loading import deferred_weights, load_decoder, materialize, read_weights
from components.models.policy import Draw, Drawn, Policy

__all__ = [
    "Draw",
    "Drawn",
    "Policy",
    "build_decoder",
    "deferred_weights",
    "from_hf",
    "hidden_states",
    "load_decoder",
    "materialize",
    "parse_dtype",
    "read_config",
    "read_weights",
    "to_hf",
]
