"""Llama 2 and 3, and everything that says it is one (SmolLM2)."""

from engine.layers.decoder import DecoderModel


class LlamaForCausalLM(DecoderModel):
    """The plain stack. Source: arXiv:2302.13971; names as in transformers."""
