"""Everything between the projection and attention, in one pass over q, k and v.

Normalises q and k where the model does, rotates them, and writes K and V into the pool.
"""

import torch
import triton
import triton.language as tl

from engine.cuda.kernels.launch import await_previous, overlap

_FEW_TOKENS = 64
"""Up to this many tokens, a program takes one or two heads, so that there are enough programs."""


def prepare_qkv_(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    kv: torch.Tensor,
) -> None:
    """Normalise and rotate q and k in place, and write K and V into the pool.

    Args:
        qkv: [T, Hq + 2 Hkv, D], contiguous; written.
        norms: weights [D] of q's and k's norm and their eps, or None.
        cos_sin: [max_position, D] float32: cos of each pair, then sin.
        positions: [T] int32.
        slots: [T] int32, block * block_size + offset of each token; -1: do not write.
        kv: [num_blocks, 2, Hkv, block_size, D], one layer of the pool; strided.
    """
    num_tokens, num_all, head_dim = qkv.shape
    _, _, num_kv_heads, block_size, _ = kv.shape
    num_heads = num_all - 2 * num_kv_heads
    query_weight, key_weight, eps = norms or (cos_sin, cos_sin, 0.0)
    if num_tokens:
        heads = 2 if num_tokens <= _FEW_TOKENS else 16
        _prepare_qkv[(num_tokens, triton.cdiv(num_all, heads))](
            qkv,
            query_weight,
            key_weight,
            cos_sin,
            positions,
            slots,
            kv,
            num_heads,
            num_kv_heads,
            block_size,
            kv.stride(0),
            kv.stride(1),
            kv.stride(2),
            eps,
            HEADS=heads,
            HALF=head_dim // 2,
            NORM=norms is not None,
            num_warps=1 if heads == 2 else 4,
            **overlap(qkv),
        )


@triton.jit
def _prepare_qkv(
    qkv,
    query_weight,
    key_weight,
    cos_sin,
    positions,
    slots,
    kv,
    num_heads,
    num_kv_heads,
    block_size,
    block_stride,
    value_stride,
    head_stride,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    num_rotated = num_heads + num_kv_heads
    num_all = num_rotated + num_kv_heads
    await_previous(OVERLAP)
    position = tl.load(positions + token).to(tl.int64)
    cos = tl.load(cos_sin + position * (2 * HALF) + pair)[None, :]
    sin = tl.load(cos_sin + position * (2 * HALF) + HALF + pair)[None, :]
    source = qkv + (token * num_all + head[:, None]) * (2 * HALF) + pair[None, :]
    inside = (head < num_all)[:, None]
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + HALF, mask=inside, other=0.0)
    left, right = low.to(tl.float32), high.to(tl.float32)
    is_query = (head < num_heads)[:, None]
    if NORM:
        mean = (tl.sum(left * left, 1) + tl.sum(right * right, 1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        low_weight = tl.where(
            is_query,
            tl.load(query_weight + pair)[None, :],
            tl.load(key_weight + pair)[None, :],
        )
        high_weight = tl.where(
            is_query,
            tl.load(query_weight + HALF + pair)[None, :],
            tl.load(key_weight + HALF + pair)[None, :],
        )
        # Rounded where a model in this dtype rounds.
        left = (left * scale).to(low.dtype).to(tl.float32) * low_weight.to(tl.float32)
        right = (right * scale).to(low.dtype).to(tl.float32) * high_weight.to(tl.float32)
        left, right = left.to(low.dtype).to(tl.float32), right.to(low.dtype).to(tl.float32)
    rotated_low = (left * cos - right * sin).to(low.dtype)
    rotated_high = (right * cos + left * sin).to(low.dtype)
    is_rotated = (head < num_rotated)[:, None]
    tl.store(source, rotated_low, mask=is_rotated)
    tl.store(source + HALF, rotated_high, mask=is_rotated)
    slot = tl.load(slots + token).to(tl.int64)
    is_value = head >= num_rotated
    first = tl.where(is_value, num_rotated, num_heads)
    target = (
        kv
        + (slot // block_size) * block_stride
        + is_value[:, None].to(tl.int64) * value_stride
        + (head - first)[:, None].to(tl.int64) * head_stride
        + (slot % block_size) * (2 * HALF)
        + pair[None, :]
    )
    is_key = ((head >= num_heads) & (head < num_rotated))[:, None]
    written = inside & (head >= num_heads)[:, None] & (slot >= 0)
    tl.store(target, tl.where(is_key, rotated_low, low), mask=written)
    tl.store(target + HALF, tl.where(is_key, rotated_high, high), mask=written)
