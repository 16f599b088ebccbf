"""Models: Hugging Face directory -> torchtune decoder -> policy."""

from components.models.decoder import (
    build_decoder,
    from_hf,
    hidden_states,
    parse_dtype,
    read_config,
    read_packed,
    to_hf,
)
from components.models.export import write_model
from components.models.head import KEPT_ELEMENTS
from components.models.identity import frozen_identity, weights_identity
from components.models.lean import use_lean_layers
from components.models.loading import deferred_weights, load_decoder, materialize, read_weights
from components.models.lora import (
    adapter_config,
    adapter_from_hf,
    adapter_to_hf,
    adapters_disabled,
    has_adapters,
    load_lora_decoder,
    merge_adapters,
    quantized_parameters,
    read_adapter,
    write_adapter,
)
from components.models.policy import Draw, Drawn, Policy
from components.models.reference import ReferencePolicy
from components.models.stand_in import KNOWN, known_config, write_stand_in

__all__ = [
    "KEPT_ELEMENTS",
    "KNOWN",
    "Draw",
    "Drawn",
    "Policy",
    "ReferencePolicy",
    "adapter_config",
    "adapter_from_hf",
    "adapter_to_hf",
    "adapters_disabled",
    "build_decoder",
    "deferred_weights",
    "from_hf",
    "frozen_identity",
    "has_adapters",
    "hidden_states",
    "known_config",
    "load_decoder",
    "load_lora_decoder",
    "materialize",
    "merge_adapters",
    "parse_dtype",
    "quantized_parameters",
    "read_adapter",
    "read_config",
    "read_packed",
    "read_weights",
    "to_hf",
    "use_lean_layers",
    "weights_identity",
    "write_adapter",
    "write_model",
    "write_stand_in",
]
