"""The gated activation of the feed-forward part."""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, overlap

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor, tile: int | None = None) -> torch.Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [T, 2 * size], contiguous: `tile` columns of gate and of up in turn.
        tile: None: size, so gate, then up.

    Returns:
        [T, size].
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    if rows:
        grid = (rows, triton.cdiv(size, _BLOCK))
        _silu_mul[grid](
            gate_up, out, size, tile or size, BLOCK=_BLOCK, num_warps=4, **overlap(gate_up)
        )
    return out


@triton.jit
def _silu_mul(gate_up, out, size, tile, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    await_previous(OVERLAP)
    first = gate_up + row * 2 * size + column // tile * (2 * tile) + column % tile
    gate = tl.load(first, mask=inside, other=0.0)
    up = tl.load(first + tile, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = activated * up.to(tl.float32)
    tl.store(out + row * size + column, product.to(gate.dtype), mask=inside)
