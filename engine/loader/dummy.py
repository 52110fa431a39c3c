"""Random weights that are the same on every device: for benchmarks and for tests of shapes."""

import math

import torch

_STD = 0.02
_CHUNK = {"cpu": 1 << 16}
"""Values made at once: a CPU's cache holds them; on a GPU the default bounds scratch memory."""
_DEFAULT_CHUNK = 1 << 24
_GOLDEN = -7046029254386353131
_MIX = -4658895280553007687
"""The odd constants of splitmix64 (G. Steele et al., OOPSLA 2014) as signed integers."""
_BITS = 24


def dummy_values(seed: int, count: int, device: torch.device) -> torch.Tensor:
    """Uniform values of mean 0 and standard deviation 0.02.

    Integer hashing of the index, so that CPU and GPU agree bit for bit, and a GPU fills itself.

    Args:
        seed: below 2**32.
        count: of values.
        device: of the result.

    Returns:
        [count] float32.
    """
    out = torch.empty(count, dtype=torch.float32, device=device)
    scale = _STD * math.sqrt(12) / (1 << _BITS)
    chunk = _CHUNK.get(device.type, _DEFAULT_CHUNK)
    for first in range(0, count, chunk):
        last = min(first + chunk, count)
        state = torch.arange(first, last, dtype=torch.int64, device=device)
        state = state.add_(seed << 31).mul_(_GOLDEN)
        for _ in range(2):
            state ^= (state >> 32) & 0xFFFFFFFF
            state *= _MIX
        bits = (state >> (64 - _BITS)) & ((1 << _BITS) - 1)
        torch.mul(bits - (1 << (_BITS - 1)), scale, out=out[first:last])
    return out
