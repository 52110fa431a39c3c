"""What is asked of a product with a weight matrix, beside the product."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """y = norm(x) W^T + b, accumulated in float32; then gated, then added to what is there.

    With a norm, x is scaled by the norm's weight as it is read and each row of the sum by its root
    mean square at the end: the same as normalising first, without the pass over x.
    """

    weight: torch.Tensor
    """[out_features or twice that, in_features], 16 bits, contiguous."""
    bias: torch.Tensor | None = None
    """One per row of `weight`."""
    norm_weight: torch.Tensor | None = None
    """[in_features] of an RMSNorm before the product."""
    eps: float = 0.0
    """Of that norm."""
    gated: bool = False
    """The first half of the rows of `weight` makes g, the second u; the result is silu(g) * u."""
    add: bool = False
    """Add to the output instead of writing it."""

    @property
    def out_features(self) -> int:
        """Columns of the result."""
        return self.weight.shape[0] // (2 if self.gated else 1)
