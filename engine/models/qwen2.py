"""Qwen2 and Qwen2.5, dense."""

from engine.layers.decoder import DecoderModel


class Qwen2ForCausalLM(DecoderModel):
    """Llama with biases on q, k and v. Source: arXiv:2407.10671; names as in transformers."""
