"""Qwen3 with experts: 30B-A3B, 235B-A22B."""

from engine.layers.decoder import DecoderModel


class Qwen3MoeForCausalLM(DecoderModel):
    """Qwen3 whose layers have experts, but for those that config.json names dense.

    Source: arXiv:2505.09388, transformers' names.
    """
