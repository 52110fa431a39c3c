"""Finds the class for an architecture; imports only that one."""

from importlib import import_module

from engine.layers.decoder import DecoderModel
from engine.models.config import ModelConfig

_MODULES = {
    "LlamaForCausalLM": "engine.models.llama",
    "MistralForCausalLM": "engine.models.mistral",
    "Phi3ForCausalLM": "engine.models.phi3",
    "Qwen2ForCausalLM": "engine.models.qwen2",
    "Qwen3ForCausalLM": "engine.models.qwen3",
    "Qwen3MoeForCausalLM": "engine.models.qwen3_moe",
    "MixtralForCausalLM": "engine.models.mixtral",
}


def model_class(config: ModelConfig) -> type[DecoderModel]:
    """The class that computes `config`. Its architecture was checked when it was parsed."""
    found: type[DecoderModel] = getattr(
        import_module(_MODULES[config.architecture]), config.architecture
    )
    return found
