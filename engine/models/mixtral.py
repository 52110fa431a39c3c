"""Mixtral 8x7B and 8x22B."""

from engine.layers.decoder import DecoderModel


class MixtralForCausalLM(DecoderModel):
    """Llama whose every layer has experts. Source: arXiv:2401.04088.

    Its weights are known here by the names that transformers 5 has; see engine/loader/stored.py.
    """
