"""Chooses the kernel for a product of a few rows with a fixed matrix.

`benchmarks/gpu_products.py` prints the table of rows and models that the limits here come from: our
kernels won at few rows; beyond, a large matrix is better read once by cuBLAS than once per tile.
"""

import torch

from engine.cuda.support import has_triton

_MAX_ROWS = 64
_MAX_ROWS_SMALL = 128
_SMALL_MATRIX = 8 << 20
"""Elements up to which a second tile of rows finds the matrix in the L2 cache."""


class FewRowsProduct:
    """x W^T + b, perhaps gated, for x [T, in_features] with few rows."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *, gated: bool = False
    ) -> None:
        """Bind to weights as engine.cuda.kernels.product.Product has them; see `few_rows`."""
        from engine.cuda.kernels.few_rows import few_rows, suits
        from engine.cuda.kernels.gemv import gemv
        from engine.cuda.kernels.product import Product

        self._product = Product(weight=weight, bias=bias, gated=gated)
        self._gemv, self._few_rows = gemv, few_rows
        self._max_rows = 1
        if suits(self._product):
            small = weight.numel() <= _SMALL_MATRIX
            self._max_rows = _MAX_ROWS_SMALL if small else _MAX_ROWS

    def takes(self, rows: int) -> bool:
        """Whether it is faster than what it stands in for."""
        return 1 <= rows <= self._max_rows

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features], contiguous -> [T, out_features]."""
        out = x.new_empty(x.shape[0], self._product.out_features)
        (self._gemv if x.shape[0] == 1 else self._few_rows)(self._product, x, out)
        return out


def suits_few_rows(weight: torch.Tensor) -> bool:
    """True if our kernels can compute products with this matrix."""
    return has_triton(weight.device) and weight.dtype.itemsize == 2 and weight.is_contiguous()
