"""Mistral 7B, Nemo, Small 3 (text only) and Ministral 8B."""

from engine.layers.decoder import DecoderModel


class MistralForCausalLM(DecoderModel):
    """Llama, of which the first versions slide. Source: arXiv:2310.06825, transformers' names."""
