"""One decoder layer, and the LM head, for few rows of different sequences: compiled code.

`engine.kernels.decode` is the only caller. All arrays are C-contiguous float32 unless said
otherwise; R is the number of rows rounded up to whole tiles, M the number that mean something.
Rows from M to R are computed and never read.

NOTE: importing compiles nothing; the first call does, or loads what an earlier process compiled.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit, prange

from engine.kernels.dot_tile import WEIGHT_ROWS, make_dot_tile, vector_lanes

Floats = npt.NDArray[np.float32]

# Sums may be taken in any order; NaN and infinity keep their meaning.
_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}
_tile_1 = make_dot_tile(1, vector_lanes())
_tile_2 = make_dot_tile(2, vector_lanes())
_tile_4 = make_dot_tile(4, vector_lanes())


class LayerWeights(NamedTuple):
    """Of one layer. Biases and norms that the model lacks have length 0."""

    input_norm: Floats
    query_norm: Floats
    key_norm: Floats
    qkv: Floats
    qkv_bias: Floats
    output: Floats
    output_bias: Floats
    mlp_norm: Floats
    gate_up: Floats
    gate_up_bias: Floats
    down: Floats
    down_bias: Floats


class Buffers(NamedTuple):
    """Where intermediate results go."""

    hidden: Floats
    """[R, hidden_size]: the residual stream, read and written."""
    normed: Floats
    """[R, hidden_size]"""
    qkv: Floats
    """[R, (Hq + 2 Hkv) * D]"""
    attended: Floats
    """[R, Hq * D]"""
    projected: Floats
    """[R, hidden_size]"""
    gate_up: Floats
    """[R, 2 * intermediate_size]"""
    gated: Floats
    """[R, intermediate_size]"""


class StepRows(NamedTuple):
    """What the rows are."""

    cos: Floats
    """[M, D]"""
    sin: Floats
    """[M, D], signed as RotaryEmbedding keeps it."""
    block_tables: npt.NDArray[np.int64]
    """[M, most blocks]"""
    context_lens: npt.NDArray[np.int64]
    """[M], the row's own token included."""


def rows_in_tiles(num_rows: int) -> int:
    """R for M."""
    return num_rows if num_rows <= 2 else -(-num_rows // 4) * 4


@njit(**_OPTIONS)
def _share(total: int, unit: int, part: int, parts: int) -> int:
    """First of `total` items that belongs to `part`; shares are whole units."""
    return total // unit * part // parts * unit


@njit(**_OPTIONS)
def _product(weight: Floats, bias: Floats, x: Floats, out: Floats, first: int, last: int) -> None:
    """out[:, first:last] = x @ weight[first:last].T + bias[first:last]."""
    rows = len(x)
    for n in range(first, last, WEIGHT_ROWS):
        if rows == 1:
            _tile_1(weight, x, out, n, 0)
        elif rows == 2:
            _tile_2(weight, x, out, n, 0)
        else:
            for m in range(0, rows, 4):
                _tile_4(weight, x, out, n, m)
    if len(bias):
        for m in range(rows):
            for n in range(first, last):
                out[m, n] += bias[n]


@njit(**_OPTIONS)
def _normalise(x: Floats, scaled_weight: Floats, floor: float, out: Floats) -> None:
    """RMSNorm of x [R, size] as engine.layers.norm computes it; floor is size * eps."""
    for m in range(len(x)):
        total = np.float32(0)
        for i in range(x.shape[1]):
            total += x[m, i] * x[m, i]
        scale = np.float32(1 / math.sqrt(total + floor))
        for i in range(x.shape[1]):
            out[m, i] = x[m, i] * scaled_weight[i] * scale


@njit(**_OPTIONS)
def _rotate(head: Floats, cos: Floats, sin: Floats) -> None:
    """RoPE of one head [D] in place."""
    half = len(head) // 2
    for i in range(half):
        low, high = head[i], head[half + i]
        head[i] = low * cos[i] + high * sin[i]
        head[half + i] = high * cos[half + i] + low * sin[half + i]


@njit(**_OPTIONS)
def _exponentials(x: Floats, powers: npt.NDArray[np.int32]) -> None:
    """exp(x) in place, in operations that exist for vectors; relative error below 1e-6.

    2^(n + r) with |r| <= 1/2: a Taylor polynomial for r, the exponent's bits for n. Far below or
    above zero the result stays at 2^-126 or 2^126.

    Args:
        x: [N].
        powers: [N], overwritten.
    """
    for i in range(len(x)):
        exponent = min(
            max(x[i] * np.float32(1.4426950408889634), np.float32(-126)), np.float32(126)
        )
        whole = math.floor(exponent + np.float32(0.5))
        rest = (exponent - np.float32(whole)) * np.float32(0.6931471805599453)
        powers[i] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        series = np.float32(1 / 5040) * rest + np.float32(1 / 720)
        series = series * rest + np.float32(1 / 120)
        series = series * rest + np.float32(1 / 24)
        series = series * rest + np.float32(1 / 6)
        series = series * rest + np.float32(1 / 2)
        series = series * rest + np.float32(1)
        x[i] = series * rest + np.float32(1)
    factors = powers.view(np.float32)
    for i in range(len(x)):
        x[i] *= factors[i]


@njit(**_OPTIONS)
def _attend(
    query: Floats, layer_blocks: Floats, table: npt.NDArray[np.int64], context_len: int, out: Floats
) -> None:
    """Query heads [G, D] that share one KV head, over its blocks [blocks, 2, block_size, D]."""
    group, dim = query.shape
    size = layer_blocks.shape[2]
    scale = np.float32(1 / math.sqrt(dim))
    padded = -(-context_len // size) * size
    weights = np.empty((group, padded), np.float32)
    powers = np.empty(padded, np.int32)
    for start in range(0, context_len, size):
        keys = layer_blocks[table[start // size], 0]
        for g in range(group):
            for offset in range(0, size, WEIGHT_ROWS):
                _tile_1(keys, query[g : g + 1], weights[g : g + 1, start:], offset, 0)
    for g in range(group):
        row = weights[g, :context_len]
        highest = row[0]
        for s in range(1, context_len):
            highest = max(highest, row[s])
        for s in range(context_len):
            row[s] = (row[s] - highest) * scale
        _exponentials(row, powers[:context_len])
        total = np.float32(0)
        for s in range(context_len):
            total += row[s]
        for s in range(context_len):
            row[s] /= total
        weights[g, context_len:] = 0
    out[:] = 0
    for start in range(0, context_len, size):
        values = layer_blocks[table[start // size], 1]
        for offset in range(0, size, 4):
            for g in range(group):
                w = weights[g, start + offset : start + offset + 4]
                w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
                for i in range(dim):
                    out[g, i] += (
                        w0 * values[offset, i]
                        + w1 * values[offset + 1, i]
                        + w2 * values[offset + 2, i]
                        + w3 * values[offset + 3, i]
                    )


@njit(**_OPTIONS)
def _place_heads(
    weights: LayerWeights,
    qkv: Floats,
    step: StepRows,
    layer_blocks: Floats,
    num_heads: int,
    head_floor: float,
) -> None:
    """Norm and rotate Q and K [M, heads, D] in place; write K and V into the pool."""
    num_kv_heads, size = layer_blocks.shape[2], layer_blocks.shape[3]
    for m in range(len(step.context_lens)):
        position = step.context_lens[m] - 1
        block, offset = step.block_tables[m, position // size], position % size
        if len(weights.query_norm):
            query, key = qkv[m, :num_heads], qkv[m, num_heads : num_heads + num_kv_heads]
            _normalise(query, weights.query_norm, head_floor, query)
            _normalise(key, weights.key_norm, head_floor, key)
        for head in range(num_heads + num_kv_heads):
            _rotate(qkv[m, head], step.cos[m], step.sin[m])
        for head in range(num_kv_heads):
            layer_blocks[block, 0, head, offset] = qkv[m, num_heads + head]
            layer_blocks[block, 1, head, offset] = qkv[m, num_heads + num_kv_heads + head]


@njit(parallel=True, **_OPTIONS)
def decode_layer(
    weights: LayerWeights,
    buffers: Buffers,
    step: StepRows,
    layer_blocks: Floats,
    floors: tuple[float, float],
    parts: int,
) -> None:
    """Add one layer's contributions to `buffers.hidden`, and its K and V to the pool.

    Args:
        weights: of the layer.
        buffers: for R rows.
        step: the M rows.
        layer_blocks: [blocks, 2, Hkv, block_size, D], the layer's part of the pool; not contiguous.
        floors: eps times the size of what is normalised: hidden states, heads.
        parts: shares of the work, one per thread.
    """
    num_rows = len(step.context_lens)
    num_kv_heads, dim = layer_blocks.shape[2], layer_blocks.shape[4]
    num_heads = buffers.attended.shape[1] // dim
    group = num_heads // num_kv_heads
    hidden, normed, projected = buffers.hidden, buffers.normed, buffers.projected
    qkv, attended, gate_up, gated = buffers.qkv, buffers.attended, buffers.gate_up, buffers.gated
    width, inner = hidden.shape[1], gated.shape[1]

    _normalise(hidden, weights.input_norm, floors[0], normed)
    for part in prange(parts):
        first, last = _share(qkv.shape[1], 4, part, parts), _share(qkv.shape[1], 4, part + 1, parts)
        _product(weights.qkv, weights.qkv_bias, normed, qkv, first, last)
    heads = qkv.reshape(len(qkv), num_heads + 2 * num_kv_heads, dim)
    outputs = attended.reshape(len(attended), num_heads, dim)
    _place_heads(weights, heads, step, layer_blocks, num_heads, floors[1])
    tables, context_lens = step.block_tables, step.context_lens
    for part in prange(parts):
        pairs = num_rows * num_kv_heads
        for pair in range(_share(pairs, 1, part, parts), _share(pairs, 1, part + 1, parts)):
            m, kv_head = pair // num_kv_heads, pair % num_kv_heads
            low, high = kv_head * group, (kv_head + 1) * group
            _attend(
                heads[m, low:high],
                layer_blocks[:, :, kv_head],
                tables[m],
                context_lens[m],
                outputs[m, low:high],
            )
    for part in prange(parts):
        first, last = _share(width, 4, part, parts), _share(width, 4, part + 1, parts)
        _product(weights.output, weights.output_bias, attended, projected, first, last)
        for m in range(num_rows):
            for n in range(first, last):
                hidden[m, n] += projected[m, n]
    _normalise(hidden, weights.mlp_norm, floors[0], normed)
    for part in prange(parts):
        first, last = _share(inner, 4, part, parts), _share(inner, 4, part + 1, parts)
        bias = weights.gate_up_bias
        _product(weights.gate_up, bias, normed, gate_up, first, last)
        _product(weights.gate_up, bias, normed, gate_up, inner + first, inner + last)
        powers = np.empty(last - first, np.int32)
        for m in range(num_rows):
            line = gated[m, first:last]
            for n in range(last - first):
                line[n] = -gate_up[m, first + n]
            _exponentials(line, powers)
            for n in range(last - first):
                gate, up = gate_up[m, first + n], gate_up[m, inner + first + n]
                line[n] = gate / (np.float32(1) + line[n]) * up
    for part in prange(parts):
        first, last = _share(width, 4, part, parts), _share(width, 4, part + 1, parts)
        _product(weights.down, weights.down_bias, gated, projected, first, last)
        for m in range(num_rows):
            for n in range(first, last):
                hidden[m, n] += projected[m, n]


@njit(parallel=True, **_OPTIONS)
def project_logits(
    scaled_norm: Floats,
    floor: float,
    head: Floats,
    hidden: Floats,
    normed: Floats,
    logits: Floats,
    parts: int,
) -> None:
    """Give logits [R, vocab_size] of hidden [R, hidden_size], final norm included."""
    _normalise(hidden, scaled_norm, floor, normed)
    bias = np.empty(0, np.float32)
    for part in prange(parts):
        first, last = _share(len(head), 4, part, parts), _share(len(head), 4, part + 1, parts)
        _product(head, bias, normed, logits, first, last)
