"""Draws one token per row of logits by inverting the CDF at one uniform number.

Two kernels: the first reduces every chunk of a row to its maximum and the sum of its weights
exp((x - maximum) / temperature); the second, one program per row, finds the chunk in which the draw
falls and re-reads only that one. A greedy row is the same with weight 1 on its largest logits and a
draw of zero, so the lowest id wins a tie. Logits are taken as within 2**60 of zero, NaN as the
least of them: a row of anything yields an id of the vocabulary.

A row's token depends on its own logits, temperature, seed and position alone.
"""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, built_once, overlap

CHUNK = 4096
"""Logits that one program reduces: 8 KiB of bf16, 16 bytes per load."""

_LARGEST = tl.constexpr(2.0**60)
_LEAST_TEMPERATURE = tl.constexpr(2.0**-60)
"""With these, the difference of two logits over a temperature stays finite."""
_LOG2_E = tl.constexpr(1.4426950408889634)


def chunk_stats(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    temperatures: torch.Tensor,
    *,
    groups: int = 0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Reduce each chunk of each row. Reads the logits once.

    Args:
        logits: [R, vocab_size], any float dtype, rows of any stride.
        rows: [N] int64, the rows meant; None: all in order.
        temperatures: [N] float32; 0 is greedy.
        groups: how many equal parts of each chunk to give the maxima of; a power of two.
        chunk: its size, a power of two.

    Returns:
        Maxima [N, C] and sums of weights [N, C] (undefined in greedy rows), float32; then the
        maxima of the groups [N, C * groups] or None.
    """
    assert logits.stride(1) == 1
    count, vocab_size = len(temperatures), logits.shape[1]
    num_chunks = triton.cdiv(vocab_size, chunk)
    maxima, sums = logits.new_empty((2, count, num_chunks), dtype=torch.float32)
    grouped = (
        logits.new_empty((count, num_chunks * groups), dtype=torch.float32) if groups else None
    )
    _chunk_stats[(num_chunks, count)](
        logits,
        rows,
        temperatures,
        maxima,
        sums,
        grouped,
        logits.stride(0),
        vocab_size,
        CHUNK=chunk,
        GROUPS=groups,
        INDEXED=rows is not None,
        num_warps=4,
        **overlap(logits),
    )
    return maxima, sums, grouped


def sum_above(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    temperatures: torch.Tensor,
    floors: torch.Tensor,
    maxima: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Chunks' sums [N, C] of the weights of logits not below their row's floor.

    Reads only chunks that reach it. Arguments as in `chunk_stats`; floors: [N] float32.
    """
    sums = torch.empty_like(maxima)
    count, num_chunks = maxima.shape
    _sum_above[(num_chunks, count)](
        logits,
        rows,
        temperatures,
        floors,
        maxima,
        sums,
        logits.stride(0),
        logits.shape[1],
        CHUNK=chunk,
        INDEXED=rows is not None,
        num_warps=4,
        **overlap(logits),
    )
    return sums


def pick(
    logits: torch.Tensor,
    rows: torch.Tensor | None,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    floors: torch.Tensor | None,
    stats: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    *,
    chunk: int = CHUNK,
) -> None:
    """Write the token of each row to `out` [N] int32. Re-reads one chunk per row.

    Args:
        logits: as `rows` and `temperatures` in `chunk_stats`.
        rows: see there.
        temperatures: see there.
        seeds: [N] int64, the bits of a seed in [0, 2**64).
        positions: [N] int32 or int64.
        floors: [N] float32: logits below are never drawn; None: no floor.
        stats: maxima and sums of the chunks, with the same floors.
        out: written.
        chunk: as it was for `stats`.
    """
    maxima, sums = stats
    count, num_chunks = maxima.shape
    _pick[(count,)](
        logits,
        rows,
        temperatures,
        seeds,
        positions,
        floors,
        maxima,
        sums,
        out,
        logits.stride(0),
        logits.shape[1],
        num_chunks,
        CHUNK=chunk,
        CHUNKS=triton.next_power_of_2(num_chunks),
        INDEXED=rows is not None,
        FLOORED=floors is not None,
        num_warps=8,
        **overlap(logits),
    )


@triton.jit
def load_finite(values, at, inside):
    """Float32s within _LARGEST of zero; minus infinity outside."""
    x = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(x == x, x, -_LARGEST)
    x = tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)
    return tl.where(inside, x, float("-inf"))


@triton.jit
def exponent_scale(temperature):
    """What a difference of logits is multiplied with to be an exponent of two."""
    return _LOG2_E / tl.maximum(temperature, _LEAST_TEMPERATURE)


@triton.jit
def row_start(row, rows, stride, INDEXED: tl.constexpr):
    """Offset of the row, or of the row that `rows` names for it."""
    if INDEXED:
        return tl.load(rows + row).to(tl.int64) * stride
    else:
        return row.to(tl.int64) * stride


@triton.jit
def _uniform(seed, position):
    """Bit-equal to engine.sampler.philox.uniform."""
    counter = position.to(tl.int64)
    high, low, _, _ = tl.philox(
        seed, (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32), 0, 0
    )
    # 27 and 26 bits, 2**26 and 2**-53.
    word = (high >> 5).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64)
    return word * 1.1102230246251565e-16


@triton.jit
def _invert(weights, index, target):
    """First index at which the cumulative weights pass the target; never one of weight zero."""
    cumulative = tl.cumsum(weights, 0)
    positive = weights > 0
    first = tl.min(tl.where(positive & (cumulative > target), index, 2147483647), 0)
    # Rounding may put the target past the end, where there is no token.
    last = tl.max(tl.where(positive, index, 0), 0)
    return tl.minimum(first, last)


@built_once("rows", "temperatures", "sums")
def _chunk_stats(
    logits,
    rows,
    temperatures,
    maxima,
    sums,
    grouped,
    stride,
    vocab_size,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    slot = row * tl.num_programs(0) + chunk
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    await_previous(OVERLAP)
    start = row_start(row, rows, stride, INDEXED)
    x = load_finite(logits + start, column, column < vocab_size)
    maximum = tl.max(x, 0)
    tl.store(maxima + slot, maximum)
    if GROUPS > 0:
        parts = tl.max(tl.reshape(x, (GROUPS, CHUNK // GROUPS)), 1)
        tl.store(grouped + slot * GROUPS + tl.arange(0, GROUPS), parts)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        weights = tl.exp2((x - maximum) * exponent_scale(temperature))
        tl.store(sums + slot, tl.sum(weights, 0))


@built_once("rows", "temperatures")
def _sum_above(
    logits,
    rows,
    temperatures,
    floors,
    maxima,
    sums,
    stride,
    vocab_size,
    CHUNK: tl.constexpr,
    INDEXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1)
    slot = row * tl.num_programs(0) + chunk
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    await_previous(OVERLAP)
    floor = tl.load(floors + row)
    maximum = tl.load(maxima + slot)
    if maximum >= floor:
        start = row_start(row, rows, stride, INDEXED)
        x = load_finite(logits + start, column, column < vocab_size)
        scale = exponent_scale(tl.load(temperatures + row))
        weights = tl.where(x >= floor, tl.exp2((x - maximum) * scale), 0.0)
        tl.store(sums + slot, tl.sum(weights, 0))
    else:
        tl.store(sums + slot, 0.0)


@built_once("rows", "temperatures", "seeds", "positions", "sums", "out")
def _pick(
    logits,
    rows,
    temperatures,
    seeds,
    positions,
    floors,
    maxima,
    sums,
    out,
    stride,
    vocab_size,
    num_chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    INDEXED: tl.constexpr,
    FLOORED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0)
    chunks = tl.arange(0, CHUNKS)
    column = tl.arange(0, CHUNK)
    await_previous(OVERLAP)
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    scale = exponent_scale(temperature)
    slot = row * num_chunks + chunks
    tops = tl.load(maxima + slot, mask=chunks < num_chunks, other=float("-inf"))
    num_sums = tl.where(greedy, 0, num_chunks)  # those of greedy rows were never written
    in_chunk = tl.load(sums + slot, mask=chunks < num_sums, other=0.0)
    maximum = tl.max(tops, 0)
    factors = tl.where(greedy, 1.0, tl.exp2((tops - maximum) * scale)).to(tl.float64)
    largest = (tops == maximum).to(tl.float64)
    weights = tl.where(greedy, largest, factors * in_chunk.to(tl.float64))
    draw = _uniform(tl.load(seeds + row), tl.load(positions + row))
    target = tl.where(greedy, 0.0, draw * tl.sum(weights, 0))
    chosen = _invert(weights, chunks, target)
    before = tl.sum(tl.where(chunks < chosen, weights, 0.0), 0)
    factor = tl.sum(tl.where(chunks == chosen, factors, 0.0), 0)
    top = tl.sum(tl.where(chunks == chosen, tops, 0.0), 0)

    column = chosen * CHUNK + column
    start = row_start(row, rows, stride, INDEXED)
    x = load_finite(logits + start, column, column < vocab_size)
    weights = tl.where(greedy, (x == top).to(tl.float32), tl.exp2((x - top) * scale))
    if FLOORED:
        weights = tl.where(x >= tl.load(floors + row), weights, 0.0)
    token = _invert(weights.to(tl.float64), column, (target - before) / factor)
    tl.store(out + row, token)
