"""A layer with experts on a GPU: choosing them, gathering each one's tokens, its products.

Nothing here waits for the device and no shape depends on what is chosen, so that steps can be
captured: as many programs start as the least favourable choice could need, and those without work
end at once. An expert's matrices are read once for each tile of its tokens; one that nobody chose
is not read. The order of sums is fixed, so equal inputs give equal bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, built_once, overlap

_CHUNK = 1024
"""Pairs that are looked at together while they are gathered."""
_FEW = 16
"""Tokens per expert, on average, up to which tiles are for reading weights; above, for
arithmetic."""


def choose(
    logits: torch.Tensor, per_token: int, *, normalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely experts of each token, by a softmax in float32.

    Args:
        logits: [T, experts], contiguous.
        per_token: how many.
        normalised: divide weights by their sum.

    Returns:
        Weights in the dtype of `logits`, and experts in int32, [T, per_token] each.
    """
    rows, count = logits.shape
    weights = logits.new_empty(rows, per_token)
    chosen = torch.empty(rows, per_token, dtype=torch.int32, device=logits.device)
    _choose[(rows,)](
        logits,
        weights,
        chosen,
        COUNT=count,
        BLOCK=triton.next_power_of_2(count),
        PER_TOKEN=per_token,
        SLOTS=triton.next_power_of_2(per_token),
        NORMALISED=normalised,
        num_warps=1,
        **overlap(logits),
    )
    return weights, chosen


@triton.jit
def _choose(
    logits,
    weights,
    chosen,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SLOTS: tl.constexpr,
    NORMALISED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)
    inside = expert < COUNT
    await_previous(OVERLAP)
    values = tl.load(logits + row * COUNT + expert, mask=inside, other=-float("inf"))
    shares = tl.exp(values.to(tl.float32) - tl.max(values.to(tl.float32), 0))
    shares = shares / tl.sum(shares, 0)
    left = tl.where(inside, shares, -1.0)
    best = tl.zeros((SLOTS,), tl.float32)
    ids = tl.zeros((SLOTS,), tl.int32)
    for i in range(PER_TOKEN):
        # Of values that are no numbers any may be found, but none beyond the experts.
        index = tl.minimum(tl.argmax(left, 0), COUNT - 1).to(tl.int32)
        best = tl.where(slot == i, tl.max(left, 0), best)
        ids = tl.where(slot == i, index, ids)
        left = tl.where(expert == index, -1.0, left)
    if NORMALISED:
        best = best / tl.sum(best, 0)
    used = slot < PER_TOKEN
    target = row * PER_TOKEN + slot
    tl.store(weights + target, best.to(weights.dtype.element_ty), mask=used)
    tl.store(chosen + target, ids, mask=used)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Pairs of a token and one of its experts, those of each expert of this rank together."""

    order: torch.Tensor
    """[pairs] int32, of pairs counted as in `chosen`; only those of this rank are set."""
    bounds: torch.Tensor
    """[experts of this rank + 1] int32, where in `order` each one's pairs begin."""
    partial: bool
    """Other ranks have experts too."""
    block_m: int
    """Pairs of a tile."""
    num_tiles: int
    """The most that there can be."""


def gather(chosen: torch.Tensor, *, first: int, count: int, total: int) -> Gathered:
    """Sort pairs by expert.

    Args:
        chosen: [T, per_token] int32, contiguous.
        first: of this rank's experts.
        count: of this rank's experts.
        total: of all ranks' experts.
    """
    pairs = chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    bounds = torch.empty(count + 1, dtype=torch.int32, device=chosen.device)
    _gather[(count + 1,)](
        chosen, order, bounds, pairs, first, count, CHUNK=_CHUNK, num_warps=4, **overlap(chosen)
    )
    each = triton.cdiv(pairs, total)
    block_m = 16 if each <= _FEW else 32 if each <= 2 * _FEW else 64
    num_tiles = (pairs + min(count, pairs) * (block_m - 1)) // block_m
    return Gathered(order, bounds, count < total, block_m, num_tiles)


@built_once("pairs")
def _gather(chosen, order, bounds, pairs, first, count, CHUNK: tl.constexpr, OVERLAP: tl.constexpr):
    index = tl.program_id(0)
    expert = first + index
    await_previous(OVERLAP)
    place = tl.zeros((), tl.int32)
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        one = tl.load(chosen + pair, mask=pair < pairs, other=-1)
        place += tl.sum(((one >= first) & (one < expert)).to(tl.int32), 0)
    tl.store(bounds + index, place)
    if index < count:
        for start in range(0, pairs, CHUNK):
            pair = start + tl.arange(0, CHUNK)
            one = tl.load(chosen + pair, mask=pair < pairs, other=-1)
            mine = (one == expert).to(tl.int32)
            tl.store(order + place + tl.cumsum(mine, 0) - 1, pair, mask=mine != 0)
            place += tl.sum(mine, 0)


def expert_products(
    x: torch.Tensor, weight: torch.Tensor, gathered: Gathered, *, per_row: int, gated: bool
) -> torch.Tensor:
    """Multiply what belongs to each pair with the matrix of its expert; float32 sums.

    Args:
        x: [pairs / per_row, in_features], contiguous.
        weight: [experts of this rank, out_features or twice that, in_features], contiguous.
        gathered: of the pairs.
        per_row: pairs that share a row of `x`.
        gated: the matrix has the rows of a gate g, then as many of u; the result is silu(g) * u.

    Returns:
        [pairs, out_features]; rows of other ranks' pairs are 0.
    """
    assert x.is_contiguous() and weight.is_contiguous()
    pairs, (count, rows, size) = gathered.order.numel(), weight.shape
    columns = rows // 2 if gated else rows
    out = (x.new_zeros if gathered.partial else x.new_empty)(pairs, columns)
    few = gathered.block_m == _FEW
    block_n = 32 if few and gated else 64
    block_k = (128 if few else 64) * 2 // x.dtype.itemsize
    _expert_products[(triton.cdiv(columns, block_n), gathered.num_tiles)](
        x,
        weight,
        gathered.order,
        gathered.bounds,
        out,
        per_row,
        COUNT=count,
        EXPERTS=triton.next_power_of_2(count),
        SIZE=size,
        COLUMNS=columns,
        GATED=gated,
        BLOCK_M=gathered.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=3,
        **overlap(x),
    )
    return out


@triton.jit
def _expert_products(
    x,
    weight,
    order,
    bounds,
    out,
    per_row,
    COUNT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    index = tl.arange(0, EXPERTS)
    await_previous(OVERLAP)
    begins = tl.load(bounds + index, mask=index < COUNT, other=0)
    ends = tl.load(bounds + index + 1, mask=index < COUNT, other=0)
    tiles = (ends - begins + BLOCK_M - 1) // BLOCK_M
    tile_ends = tl.cumsum(tiles, 0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert < COUNT:
        own = index == expert
        place = tl.sum(tl.where(own, begins + (tile - tile_ends + tiles) * BLOCK_M, 0), 0)
        place += tl.arange(0, BLOCK_M)
        used = (place < tl.sum(tl.where(own, ends, 0), 0))[:, None]
        pair = tl.load(order + place[:, None], mask=used, other=0).to(tl.int64)
        inside = (column < COLUMNS)[None, :]
        height: tl.constexpr = 2 * COLUMNS if GATED else COLUMNS
        inputs = x + pair // per_row * SIZE + k[None, :]
        matrix = weight + expert.to(tl.int64) * height * SIZE
        weights = matrix + column[None, :].to(tl.int64) * SIZE + k[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, SIZE, BLOCK_K):
            rest = k < SIZE - start
            value_mask, weight_mask = used & rest[None, :], inside & rest[:, None]
            values = tl.load(inputs + start, mask=value_mask, other=0.0)
            part = tl.load(weights + start, mask=weight_mask, other=0.0)
            total = tl.dot(values, part, total, input_precision="ieee")
            if GATED:
                part_up = tl.load(weights + COLUMNS * SIZE + start, mask=weight_mask, other=0.0)
                total_up = tl.dot(values, part_up, total_up, input_precision="ieee")
        dtype = out.dtype.element_ty
        if GATED:
            # Rounded where torch's operations round.
            gate = total.to(dtype).to(tl.float32)
            gate = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
            total = gate * total_up.to(dtype).to(tl.float32)
        tl.store(out + pair * COLUMNS + column[None, :], total.to(dtype), mask=used & inside)
