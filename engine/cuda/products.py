"""Chooses the kernel for a product of a few rows with a fixed matrix."""

from collections.abc import Callable

import torch

from engine.cuda.support import has_triton

MAX_FEW_ROWS = 128
"""Beyond it cuBLAS is as fast: at 256 rows it took 7.4 to 9.2 us for matrices of Qwen3-0.6B, where
these kernels took 6.7 to 9.6."""


def few_rows_product(
    weight: torch.Tensor, bias: torch.Tensor | None
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function that computes x W^T + b for x [T, in_features] with T <= MAX_FEW_ROWS.

    None where cuBLAS, or the CPU's library, is to compute all.
    """
    if not has_triton(weight.device) or weight.dtype.itemsize != 2 or not weight.is_contiguous():
        return None
    from engine.cuda.kernels.few_rows import few_rows, suits
    from engine.cuda.kernels.gemv import gemv
    from engine.cuda.kernels.product import Product

    product = Product(weight=weight, bias=bias)
    tiled = suits(product)

    def compute(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 1 and not tiled:
            return torch.nn.functional.linear(x, weight, bias)
        out = x.new_empty(x.shape[0], weight.shape[0])
        (few_rows if x.shape[0] > 1 else gemv)(product, x, out)
        return out

    return compute
