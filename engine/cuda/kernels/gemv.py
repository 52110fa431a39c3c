"""The product of one row with a weight matrix, bound by reading the weights.

A program starts to read its rows of the matrix before the kernel before it has ended: the weights
do not depend on it. `benchmarks/gpu_products.py` compares it with cuBLAS.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as cuda_language

from engine.cuda.kernels.launch import overlap
from engine.cuda.kernels.product import GATE_TILE, Product

_TILE = 2048
"""Elements of the matrix that a program has in flight; 4 KiB, so 16 bytes for each thread twice."""


def gemv(product: Product, x: torch.Tensor, out: torch.Tensor) -> None:
    """Compute a product; see `Product`.

    Args:
        product: of any shape.
        x: [1, in_features], contiguous.
        out: [1, out_features].
    """
    out_features, size = product.out_features, product.weight.shape[1]
    block = min(triton.next_power_of_2(size), _TILE)
    columns = _TILE // block
    bias = product.bias
    _gemv[(triton.cdiv(out_features, columns),)](
        x,
        product.weight,
        product.weight if bias is None else bias,
        out,
        out_features,
        SIZE=size,
        BLOCK_N=columns,
        BLOCK_K=block,
        EVEN=size % block == 0 and out_features % columns == 0,
        BIAS=bias is not None,
        GATED=product.gated,
        GATE_TILE=GATE_TILE,
        num_warps=4,
        **overlap(x),
    )


@triton.jit
def _tile(source, inside, k, start, SIZE: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(source + start)
    return tl.load(source + start, mask=inside & (k < SIZE - start), other=0.0)


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    out,
    out_features,
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    GATE_TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (column < out_features)[:, None]
    weight_row = column
    if GATED:
        weight_row = column // GATE_TILE * (2 * GATE_TILE) + column % GATE_TILE
    source = weight + weight_row[:, None].to(tl.int64) * SIZE + k[None, :]
    up_source = source + GATE_TILE * SIZE
    tile = _tile(source, inside, k[None, :], 0, SIZE, EVEN)
    up_tile = tile
    if GATED:
        up_tile = _tile(up_source, inside, k[None, :], 0, SIZE, EVEN)
    if OVERLAP:
        cuda_language.gdc_wait()
        cuda_language.gdc_launch_dependents()
    values = _tile(x + k, True, k, 0, SIZE, EVEN).to(tl.float32)
    total = tile.to(tl.float32) * values[None, :]
    up_total = total
    if GATED:
        up_total = up_tile.to(tl.float32) * values[None, :]
    for start in range(BLOCK_K, SIZE, BLOCK_K):
        tile = _tile(source, inside, k[None, :], start, SIZE, EVEN)
        if GATED:
            up_tile = _tile(up_source, inside, k[None, :], start, SIZE, EVEN)
        values = _tile(x + k, True, k, start, SIZE, EVEN).to(tl.float32)
        total += tile.to(tl.float32) * values[None, :]
        if GATED:
            up_total += up_tile.to(tl.float32) * values[None, :]
    result = tl.sum(total, 1)
    valid = column < out_features
    dtype = out.dtype.element_ty
    if BIAS:
        result += tl.load(bias + weight_row, mask=valid, other=0.0).to(tl.float32)
    if GATED:
        up_result = tl.sum(up_total, 1)
        if BIAS:
            added = tl.load(bias + weight_row + GATE_TILE, mask=valid, other=0.0)
            up_result += added.to(tl.float32)
        # Rounded where the two kernels that this replaces round.
        gate = result.to(dtype).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        result = gate * up_result.to(dtype).to(tl.float32)
    tl.store(out + column, result.to(dtype), mask=valid)
