"""What is asked of a product with a weight matrix, beside the product."""

from dataclasses import dataclass

import torch

GATE_TILE = 32
"""Rows of a gate that alternate with as many rows of what it gates, so that one tile has both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """y = x W^T + b, accumulated in float32, then gated."""

    weight: torch.Tensor
    """[out_features or twice that, in_features], 16 bits, contiguous."""
    bias: torch.Tensor | None = None
    """One per row of `weight`."""
    gated: bool = False
    """Rows of `weight` are GATE_TILE of a gate g and GATE_TILE of u in turn; the result is
    silu(g) * u."""

    @property
    def out_features(self) -> int:
        """Columns of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)


def alternated(halves: torch.Tensor) -> torch.Tensor:
    """Rows of a gate [n, ...] followed by those of u [n, ...] -> tiles of both in turn, a copy."""
    tiles = halves.view(2, -1, GATE_TILE, *halves.shape[1:])
    return tiles.transpose(0, 1).reshape(halves.shape)
