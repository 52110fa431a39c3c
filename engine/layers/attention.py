"""The self-attention part of a decoder layer."""

import torch

from engine.layers.context import ForwardContext
from engine.layers.linear import load_linear
from engine.layers.norm import RMSNorm
from engine.loader.source import WeightSource
from engine.models.config import ModelConfig
from engine.parallel.group import RankGroup


class SelfAttention:
    """Projections, norms of q and k if there are, RoPE, attention over the pool, projection."""

    def __init__(
        self,
        source: WeightSource,
        prefix: str,
        config: ModelConfig,
        group: RankGroup,
        *,
        layer: int,
        pack: bool,
    ) -> None:
        """Load this rank's heads of `prefix`.{q,k,v,o}_proj and, for models with them, the norms.

        Args:
            source: of the checkpoint.
            prefix: of the names in it.
            config: of the whole model.
            group: whose ranks share the heads.
            layer: index of the layer.
            pack: see `Linear`.
        """
        self._layer = layer
        self._group = group
        self._head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        kv_copies = max(1, group.size // config.num_kv_heads)
        self.qkv = load_linear(
            source.split(0),
            [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"],
            [query_size, kv_size, kv_size],
            config.hidden_size,
            bias=config.qkv_bias,
            pack=pack,
            copies=(1, kv_copies, kv_copies),
        )
        self.output = load_linear(
            source.split(1),
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

    def __call__(
        self, x: torch.Tensor, context: ForwardContext, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend, and write this step's K and V into the pool.

        Args:
            x: [T, hidden_size].
            context: of this step.
            rows: [N], whose output is wanted; None: all.

        Returns:
            [T or N, hidden_size].
        """
        qkv = self.qkv(x).view(len(x), -1, self._head_dim)
        attended = context.attend(qkv, self.norms, self._layer)
        part = self.output(attended if rows is None else attended.index_select(0, rows))
        return self._group.all_reduce_(part)
