"""Qwen3, dense."""

from engine.layers.decoder import DecoderModel


class Qwen3ForCausalLM(DecoderModel):
    """Llama with q and k normalised per head. Source: arXiv:2505.09388, transformers' names."""
