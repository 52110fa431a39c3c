"""Products of up to a few hundred rows with a weight matrix, bound by reading the weights.

The matrix is cut along its rows and, where that gives fewer programs than the GPU has
multiprocessors, along the sum as well. Parts of a sum meet in a workspace, and the program that
comes last adds them in a fixed order: the result does not depend on who comes when. A program asks
for its first weights before the kernel before it has ended, for they do not depend on it.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as cuda_language

from engine.cuda.kernels.launch import built_once, fetch_to_l2, overlap
from engine.cuda.kernels.product import GATE_TILE, Product

_MAX_BLOCK_M = 64
_MAX_BLOCK_N = 2 * GATE_TILE
_BLOCK_K = 128
_MAX_SPLIT = 8
_SMALL_MATRIX = 8 << 20
"""Elements up to which narrow tiles, and so more of them, were faster (matrices of Qwen3-0.6B)."""
_LINE = 64
"""16-bit elements of a line of the L2 cache."""


@dataclass(frozen=True, slots=True)
class FewRowsWorkspace:
    """Memory in which parts of sums meet; one per device, used by one stream."""

    parts: torch.Tensor
    """float32, one tile for each program."""
    arrived: torch.Tensor
    """int32, zero between kernels; programs of a tile that have stored their part."""
    num_programs: int
    """Programs that run at once, one per multiprocessor."""


@cache
def workspace_of(device: torch.device) -> FewRowsWorkspace:
    """The device's, which all matrices share: products on one stream follow one another."""
    count = 8
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    tile = _MAX_BLOCK_M * _MAX_BLOCK_N
    return FewRowsWorkspace(
        parts=torch.empty(count * tile, dtype=torch.float32, device=device),
        arrived=torch.zeros(count, dtype=torch.int32, device=device),
        num_programs=count,
    )


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a product is divided among programs."""

    block_m: int
    block_n: int
    split: int
    early: bool
    """Let the next kernel start before the sum rather than after it."""
    prefetch: int = 2
    """Lines of each row of the matrix that are asked for ahead."""
    stages: int = 4


def tiling_for(product: Product, rows: int, num_programs: int) -> Tiling:
    """Tiles so that one wave of programs reads the matrix, where it is small enough."""
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else _MAX_BLOCK_M
    out_rows, size = product.weight.shape
    small = out_rows * size <= _SMALL_MATRIX and not product.gated
    block_n = _MAX_BLOCK_N // 2 if small else _MAX_BLOCK_N
    tiles = out_rows // block_n * triton.cdiv(rows, block_m)
    split = 1
    while (
        split < _MAX_SPLIT
        and tiles * split * 2 <= num_programs
        and size % (split * 2 * _BLOCK_K) == 0
    ):
        split *= 2
    return Tiling(block_m, block_n, split, early=rows > 32)


def suits(product: Product) -> bool:
    """True if the matrix can be cut into whole tiles."""
    rows, columns = product.weight.shape
    return rows % _MAX_BLOCK_N == 0 and columns % _BLOCK_K == 0


def few_rows(
    product: Product,
    x: torch.Tensor,
    out: torch.Tensor,
    tiling: Tiling | None = None,
) -> None:
    """Compute a product; see `Product`.

    Args:
        product: that `suits`.
        x: [T, in_features], contiguous.
        out: [T, out_features], contiguous.
        tiling: None takes the usual one.
    """
    rows, size = x.shape
    workspace = workspace_of(x.device)
    tiling = tiling or tiling_for(product, rows, workspace.num_programs)
    tiles_n = product.weight.shape[0] // tiling.block_n
    lines = size // tiling.split // _LINE
    bias = product.bias
    _few_rows[(tiles_n, triton.cdiv(rows, tiling.block_m), tiling.split)](
        x,
        product.weight,
        product.weight if bias is None else bias,
        out,
        workspace.parts,
        workspace.arrived,
        rows,
        product.out_features,
        SIZE=size,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        BLOCK_K=_BLOCK_K,
        SPLIT=tiling.split,
        BIAS=bias is not None,
        GATED=product.gated,
        PREFETCH=min(tiling.prefetch, 1 << (lines.bit_length() - 1)),
        EARLY=tiling.early,
        num_warps=4,
        num_stages=tiling.stages,
        **overlap(x),
    )


@built_once("rows")
def _few_rows(
    x,
    weight,
    bias,
    out,
    parts,
    arrived,
    rows,
    out_features,
    SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PREFETCH: tl.constexpr,
    EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile_n = tl.program_id(0)
    tile = tl.program_id(1) * tl.num_programs(0) + tile_n
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(2)
    first = part * (SIZE // SPLIT)
    k = first + tl.arange(0, BLOCK_K)
    weights = weight + column[None, :].to(tl.int64) * SIZE + k[:, None]
    inputs = x + row[:, None] * SIZE + k[None, :]
    used = (row < rows)[:, None]
    if OVERLAP:
        line = first + tl.arange(0, PREFETCH) * 64
        fetch_to_l2(weight + column[:, None].to(tl.int64) * SIZE + line[None, :])
        if EARLY:
            cuda_language.gdc_launch_dependents()
        cuda_language.gdc_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, SIZE // SPLIT, BLOCK_K):
        matrix = tl.load(weights + start)
        values = tl.load(inputs + start, mask=used, other=0.0)
        total = tl.dot(values, matrix, total)
    # Not earlier for few rows: programs of the next kernel would take shared memory from ours.
    if OVERLAP and not EARLY:
        cuda_language.gdc_launch_dependents()
    last = True
    if SPLIT > 1:
        cell = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mine = parts + tile * SPLIT * BLOCK_M * BLOCK_N + cell
        tl.store(mine + part * BLOCK_M * BLOCK_N, total)
        tl.debug_barrier()
        count = tl.atomic_add(arrived + tile, 1, sem="acq_rel")
        last = count == SPLIT - 1
        if last:
            tl.debug_barrier()
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for other in range(SPLIT):
                total += tl.load(mine + other * BLOCK_M * BLOCK_N, volatile=True)
            tl.store(arrived + tile, 0)
    if last:
        dtype = out.dtype.element_ty
        if BIAS:
            total += tl.load(bias + column).to(tl.float32)[None, :]
        if GATED:
            HALF: tl.constexpr = BLOCK_N // 2
            pairs = tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1))
            gate, up = tl.split(pairs)
            # Rounded where the two kernels that this replaces round.
            gate = gate.to(dtype).to(tl.float32)
            gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            gated = gate * up.to(dtype).to(tl.float32)
            half_column = tile_n * HALF + tl.arange(0, HALF)
            target = out + row[:, None].to(tl.int64) * out_features + half_column[None, :]
            tl.store(target, gated.to(dtype), mask=used)
        else:
            target = out + row[:, None].to(tl.int64) * out_features + column[None, :]
            tl.store(target, total.to(dtype), mask=used)
