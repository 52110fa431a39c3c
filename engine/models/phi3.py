"""Phi-3 with contexts of 4k, and Phi-4."""

from engine.layers.decoder import DecoderModel


class Phi3ForCausalLM(DecoderModel):
    """Llama whose checkpoints store q, k and v as one matrix, and gate and up as one.

    Source: arXiv:2404.14219, arXiv:2412.08905. Its weights are known here by Llama's names; see
    engine/loader/stored.py.
    """
