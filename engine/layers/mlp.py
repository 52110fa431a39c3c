"""The feed-forward part of a decoder layer."""

import torch
from torch.nn import functional

from engine.cuda.support import has_triton
from engine.layers.linear import load_linear
from engine.loader.source import WeightSource
from engine.models.config import ModelConfig
from engine.parallel.group import RankGroup


class GatedMLP:
    """down(silu(gate(x)) * up(x)); gate and up are one product."""

    def __init__(
        self,
        source: WeightSource,
        prefix: str,
        config: ModelConfig,
        group: RankGroup,
        *,
        pack: bool,
    ) -> None:
        """Load this rank's part of `prefix`.{gate,up,down}_proj. `config` is the whole model's."""
        inner = config.intermediate_size
        self._group = group
        self._part_size = inner // group.size
        self._fused = has_triton(source.device)
        self.gate_up = load_linear(
            source.split(0),
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            [inner, inner],
            config.hidden_size,
            bias=config.mlp_bias,
            pack=pack,
        )
        self.down = load_linear(
            source.split(1),
            [f"{prefix}.down_proj"],
            [config.hidden_size],
            inner,
            bias=config.mlp_bias,
            pack=pack,
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        gate_up = self.gate_up(x)
        if self._fused:
            from engine.cuda.kernels.activation import silu_mul

            product = silu_mul(gate_up)
        else:
            gate = functional.silu(gate_up[:, : self._part_size])
            product = gate.mul_(gate_up[:, self._part_size :])
        return self._group.all_reduce_(self.down(product))
