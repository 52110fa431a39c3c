"""The feed-forward part of a decoder layer."""

import torch
from torch.nn import functional

from engine.cuda.products import FewRowsProduct, suits_few_rows
from engine.cuda.support import has_triton
from engine.layers.linear import Linear, load_linear
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
        self.gate_up = load_linear(
            source.split(0),
            [f"{prefix}.gate_proj", f"{prefix}.up_proj"],
            [inner, inner],
            config.hidden_size,
            bias=config.mlp_bias,
            pack=pack,
        )
        self._fused = has_triton(source.device)
        self._gate_tile = _alternate_(self.gate_up) if self._fused else None
        self._gated: FewRowsProduct | None = None
        if self._gate_tile is not None:
            self._gated = FewRowsProduct(self.gate_up.weight, self.gate_up.bias, gated=True)
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
        return self._group.all_reduce_(self.down(self._gate(x)))

    def _gate(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, this rank's part of intermediate_size]."""
        if self._gated is not None and self._gated.takes(len(x)):
            return self._gated(x)
        gate_up = self.gate_up(x)
        if self._fused:
            from engine.cuda.kernels.activation import silu_mul

            return silu_mul(gate_up, self._gate_tile)
        gate = functional.silu(gate_up[:, : self._part_size])
        return gate.mul_(gate_up[:, self._part_size :])


def _alternate_(gate_up: Linear) -> int | None:
    """Let rows of gate and of up take turns, so that a tile of their product can be gated.

    Returns:
        How many of each; None where the weights stay as they are.
    """
    from engine.cuda.kernels.product import GATE_TILE, alternated

    weight = gate_up.weight
    if not suits_few_rows(weight) or weight.shape[0] % (2 * GATE_TILE):
        return None
    weight.copy_(alternated(weight))
    if gate_up.bias is not None:
        gate_up.bias.copy_(alternated(gate_up.bias))
    return GATE_TILE
