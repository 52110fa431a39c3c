"""RMSNorm, alone and together with the addition to the residual stream before it."""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, overlap


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last dimension; the arithmetic is float32, the result as `x`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows, size = x.numel() // x.shape[-1], x.shape[-1]
    if rows:
        _launch(x, x, weight, out, eps, rows, size, add=False)
    return out


def add_rms_norm_(
    hidden: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """Hidden += delta, in place; returns the sum normalised. Both [T, size], contiguous."""
    out = torch.empty_like(hidden)
    rows, size = hidden.shape
    if rows:
        _launch(hidden, delta, weight, out, eps, rows, size, add=True)
    return out


def _launch(
    hidden: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    rows: int,
    size: int,
    *,
    add: bool,
) -> None:
    assert hidden.is_contiguous() and delta.is_contiguous()
    block = triton.next_power_of_2(size)
    _rms_norm[(rows,)](
        hidden,
        delta,
        weight,
        out,
        size,
        eps,
        BLOCK=block,
        ADD=add,
        num_warps=min(max(block // 512, 1), 16),
        **overlap(hidden),
    )


@triton.jit
def _rms_norm(
    hidden,
    delta,
    weight,
    out,
    size,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(weight + column, mask=inside, other=0.0)
    await_previous(OVERLAP)
    x = tl.load(hidden + row + column, mask=inside, other=0.0)
    if ADD:
        added = tl.load(delta + row + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row + column, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / size
    normed = (wide * tl.rsqrt(mean + eps)).to(x.dtype)
    scaled = normed.to(tl.float32) * scale.to(tl.float32)
    tl.store(out + row + column, scaled.to(x.dtype), mask=inside)
