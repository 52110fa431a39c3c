"""The self-attention part of a decoder layer."""

import torch

from engine.layers.context import ForwardContext
from engine.layers.linear import load_linear
from engine.layers.norm import RMSNorm
from engine.layers.rope import rotate_
from engine.loader.source import WeightSource
from engine.models.config import ModelConfig


class SelfAttention:
    """Projections, norms of q and k if there are, RoPE, attention over the pool, projection."""

    def __init__(
        self, source: WeightSource, prefix: str, config: ModelConfig, layer: int, pack: bool
    ) -> None:
        """Load `prefix`.{q,k,v,o}_proj and, for models that have them, the norms."""
        self._layer = layer
        self._head_dim = config.head_dim
        self._num_heads = config.num_heads
        self._num_rotated = config.num_heads + config.num_kv_heads
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.qkv = load_linear(
            source,
            [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"],
            [query_size, kv_size, kv_size],
            config.hidden_size,
            bias=config.qkv_bias,
            pack=pack,
        )
        self.output = load_linear(
            source,
            [f"{prefix}.o_proj"],
            [config.hidden_size],
            query_size,
            bias=config.output_bias,
            pack=pack,
        )
        self.norms: tuple[RMSNorm, RMSNorm] | None = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.norms = (
                RMSNorm(source, f"{prefix}.q_norm", config.head_dim, eps),
                RMSNorm(source, f"{prefix}.k_norm", config.head_dim, eps),
            )

    def __call__(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]; writes this step's K and V into the pool."""
        qkv = self.qkv(x).view(len(x), -1, self._head_dim)  # [T, Hq + 2 Hkv, D]
        rotated = qkv[:, : self._num_rotated]
        query = qkv[:, : self._num_heads]
        key = qkv[:, self._num_heads : self._num_rotated]
        if self.norms:
            query.copy_(self.norms[0](query))
            key.copy_(self.norms[1](key))
        rotate_(rotated, context.cos, context.sin)
        value = qkv[:, self._num_rotated :]
        return self.output(context.attention.forward(query, key, value, self._layer))
