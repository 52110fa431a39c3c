"""Finds the least logit that top_k, top_p and min_p keep in each row.

Exact, without sorting and without the host: the answer is found bit by bit in the order-preserving
integer image of a float32, counting (top_k) or weighing (top_p) what lies above each trial. This is
done over a few candidates, the logits above a bound that the maxima of small groups give: if k
groups have a maximum of at least b, at least k logits are at least b. Only where the candidates
turn out not to hold the answer (a flat distribution) is the whole row searched.
"""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, built_once, overlap
from engine.cuda.kernels.sampling import (
    CHUNK,
    exponent_scale,
    load_finite,
    row_start,
)

GROUPS = 64
"""Groups per chunk of logits."""
CANDIDATES = 2048
"""Most candidates of a row."""


def floors_of(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    temperatures: torch.Tensor,
    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    chunk: int = CHUNK,
    candidates: int = CANDIDATES,
) -> torch.Tensor:
    """Least logit kept in each row, [N] float32; minus infinity where nothing is dropped.

    Reads only the chunks in which candidates lie, unless a row must be searched.

    Args:
        logits: as `rows` and `temperatures` in `sampling.chunk_stats`.
        rows: see there.
        temperatures: see there.
        filters: [N] each: top_k int32, 0 for all; top_p float64; temperature * ln(min_p) float32,
            minus infinity for none. Greedy rows have none of them.
        stats: maxima, sums and groups' maxima as `chunk_stats` gives.
        chunk: as it was for `stats`.
        candidates: most of a row; a power of two.
    """
    top_ks, top_ps, drops = filters
    maxima, sums, grouped = stats
    count, num_chunks = maxima.shape
    vocab_size = logits.shape[1]
    num_groups = grouped.shape[1]
    found = logits.new_empty((count, candidates), dtype=torch.float32)
    counts = logits.new_empty(count, dtype=torch.int32)
    bounds = logits.new_empty(count, dtype=torch.float32)
    floors = torch.empty_like(bounds)
    launch = overlap(logits)
    _bound[(count,)](
        top_ks,
        top_ps,
        grouped,
        bounds,
        counts,
        num_groups,
        GROUPS=triton.next_power_of_2(num_groups),
        CANDIDATES=candidates,
        FEW=vocab_size <= candidates,
        num_warps=8,
        **launch,
    )
    _collect[(num_chunks, count)](
        logits,
        rows,
        bounds,
        maxima,
        found,
        counts,
        logits.stride(0),
        vocab_size,
        CHUNK=chunk,
        CANDIDATES=candidates,
        INDEXED=rows is not None,
        num_warps=8,
        **launch,
    )
    _floor[(count,)](
        logits,
        rows,
        temperatures,
        top_ks,
        top_ps,
        drops,
        maxima,
        sums,
        found,
        counts,
        floors,
        logits.stride(0),
        vocab_size,
        NUM_CHUNKS=num_chunks,
        CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(num_chunks),
        CANDIDATES=candidates,
        # The low half of a bf16's float32 image says nothing.
        BITS=16 if logits.dtype == torch.bfloat16 else 32,
        INDEXED=rows is not None,
        num_warps=8,
        **launch,
    )
    return floors


@triton.jit
def _key_of(x):
    """An unsigned integer that orders as the float does."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def _float_of(key):
    """The float of a key; minus infinity for keys that no float has."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return tl.where(key < 0x00800000, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def _above(
    values,
    length,
    key,
    maximum,
    scale,
    COUNT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many values have at least this key, or the sum of their weights; float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for block in range(NUM_BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < length
        x = load_finite(values, column, inside)
        if COUNT:
            weights = tl.full((BLOCK,), 1.0, tl.float64)
        else:
            weights = tl.exp2((x - maximum) * scale).to(tl.float64)
        total += tl.where(inside & (_key_of(x) >= key), weights, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _descend(
    values,
    length,
    goal,
    maximum,
    scale,
    COUNT: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Largest key above which the goal is reached; 0 if all values don't reach it."""
    key = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(BITS):
        above = _above(values, length, key | bit, maximum, scale, COUNT, NUM_BLOCKS, BLOCK)
        key = tl.where(above >= goal, key | bit, key)
        bit = bit >> 1
    return key


@triton.jit
def _nucleus(
    values,
    length,
    top_k,
    top_p,
    mass,
    maximum,
    scale,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):
    """Key of the least value that top_k and then top_p keep; 0 if the values don't reach it."""
    key = tl.full((), 0, tl.uint32)
    if top_k > 0:
        key = _descend(
            values, length, top_k.to(tl.float64), maximum, scale, True, NUM_BLOCKS, BLOCK, BITS
        )
        if top_p < 1:
            # Of tokens as likely as the last of the k, only as many count as make up k.
            beyond = key + (1 << (32 - BITS))
            more = _above(values, length, beyond, maximum, scale, True, NUM_BLOCKS, BLOCK)
            mass = _above(values, length, beyond, maximum, scale, False, NUM_BLOCKS, BLOCK)
            tied = _above(values, length, key, maximum, scale, True, NUM_BLOCKS, BLOCK) - more
            tied_mass = _above(values, length, key, maximum, scale, False, NUM_BLOCKS, BLOCK) - mass
            mass += tied_mass * ((top_k.to(tl.float64) - more) / tied)
    if top_p < 1:
        reached = _descend(
            values, length, top_p * mass, maximum, scale, False, NUM_BLOCKS, BLOCK, BITS
        )
        key = tl.maximum(key, reached)
    return key


@built_once("top_ks", "top_ps")
def _bound(
    top_ks,
    top_ps,
    grouped,
    bounds,
    counts,
    num_groups,
    GROUPS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    FEW: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A bound above which about as many logits lie as the filters keep."""
    row = tl.program_id(0)
    await_previous(OVERLAP)
    top_k = tl.load(top_ks + row)
    goal = tl.where(top_k > 0, top_k, CANDIDATES // 2)
    if (top_k <= 0) & (tl.load(top_ps + row) >= 1):
        tl.store(bounds + row, float("inf"))
        tl.store(counts + row, 0)
    elif (goal > CANDIDATES // 2) & (not FEW):
        tl.store(bounds + row, float("inf"))
        tl.store(counts + row, CANDIDATES + 1)
    elif FEW:
        tl.store(bounds + row, float("-inf"))
        tl.store(counts + row, 0)
    else:
        values = grouped + row.to(tl.int64) * num_groups
        key = _descend(values, num_groups, goal.to(tl.float64), 0.0, 0.0, True, 1, GROUPS, 32)
        tl.store(bounds + row, _float_of(key))
        tl.store(counts + row, 0)


@built_once("rows")
def _collect(
    logits,
    rows,
    bounds,
    maxima,
    found,
    counts,
    stride,
    vocab_size,
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    await_previous(OVERLAP)
    bound = tl.load(bounds + row)
    if tl.load(maxima + row * tl.num_programs(0) + chunk) >= bound:
        inside = column < vocab_size
        start = row_start(row, rows, stride, INDEXED)
        x = load_finite(logits + start, column, inside)
        kept = (inside & (x >= bound)).to(tl.int32)
        first = tl.atomic_add(counts + row, tl.sum(kept, 0))
        place = first + tl.cumsum(kept, 0) - 1
        target = found + row.to(tl.int64) * CANDIDATES + place
        tl.store(target, x, mask=(kept > 0) & (place < CANDIDATES))


@built_once("rows", "temperatures", "top_ks", "top_ps", "drops", "sums")
def _floor(
    logits,
    rows,
    temperatures,
    top_ks,
    top_ps,
    drops,
    maxima,
    sums,
    found,
    counts,
    floors,
    stride,
    vocab_size,
    NUM_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BITS: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    await_previous(OVERLAP)
    scale = exponent_scale(tl.load(temperatures + row))
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    slot = row * NUM_CHUNKS + chunks
    tops = tl.load(maxima + slot, mask=chunks < NUM_CHUNKS, other=float("-inf"))
    in_chunk = tl.load(sums + slot, mask=chunks < NUM_CHUNKS, other=0.0).to(tl.float64)
    maximum = tl.max(tops, 0)
    mass = tl.sum(tl.exp2((tops - maximum) * scale).to(tl.float64) * in_chunk, 0)
    floor = maximum + tl.load(drops + row)
    if (top_k > 0) | (top_p < 1):
        count = tl.load(counts + row)
        key = tl.full((), 0, tl.uint32)
        if count <= CANDIDATES:
            values = found + row.to(tl.int64) * CANDIDATES
            key = _nucleus(values, count, top_k, top_p, mass, maximum, scale, 1, CANDIDATES, BITS)
        if key == 0:
            values = logits + row_start(row, rows, stride, INDEXED)
            key = _nucleus(
                values, vocab_size, top_k, top_p, mass, maximum, scale, NUM_CHUNKS, CHUNK, BITS
            )
        floor = tl.maximum(floor, _float_of(key))
    tl.store(floors + row, floor)
