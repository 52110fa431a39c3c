"""Rotary position embedding: tables of cos and sin, and their application to q and k.

Source: arXiv:2104.09864; the scaled kinds as in Hugging Face transformers' modeling_rope_utils
(Apache-2.0): linear, llama3, and yarn (arXiv:2309.00071).
"""

import math

import torch

from engine.models.config import RopeConfig


class RotaryEmbedding:
    """cos and sin for every position up to a limit."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        max_position: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Compute the tables in float32 and keep them in `dtype`, [max_position, 1, head_dim]."""
        cos, sin = _cos_sin(config, head_dim, max_position)
        # The sign of the rotated first half lies in the table, so applying needs no negation.
        self.cos = torch.cat((cos, cos), -1)[:, None].to(device=device, dtype=dtype)
        self.sin = torch.cat((-sin, sin), -1)[:, None].to(device=device, dtype=dtype)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and signed sin of positions [T], each [T, 1, head_dim]."""
        return self.cos.index_select(0, positions), self.sin.index_select(0, positions)


def cos_sin_table(
    config: RopeConfig, head_dim: int, max_position: int, device: torch.device
) -> torch.Tensor:
    """[max_position, head_dim] float32: cos of each pair, then its sin."""
    return torch.cat(_cos_sin(config, head_dim, max_position), -1).to(device)


def _cos_sin(
    config: RopeConfig, head_dim: int, max_position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq, scale = inverse_frequencies(config, head_dim)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), inv_freq)
    return angles.cos() * scale, angles.sin() * scale


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads in place.

    Args:
        x: [T, heads, head_dim]; written.
        cos: [T, 1, head_dim].
        sin: [T, 1, head_dim], as `RotaryEmbedding.rows` returns it.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    x.mul_(cos).addcmul_(swapped, sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair, [head_dim / 2] float32, and the scale of cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    base = 1.0 / (config.theta**exponents)
    match config.kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / config.factor, 1.0
        case "llama3":
            return _llama3(config, base), 1.0
        case "yarn":
            return _yarn(config, base, head_dim)


def _llama3(config: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    wavelength = 2 * math.pi / base
    smooth = (config.original_max_len / wavelength - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * base / config.factor + smooth * base


def _yarn(config: RopeConfig, base: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, float]:
    def dimension(rotations: float) -> float:
        ratio = config.original_max_len / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(config.theta))

    low = max(math.floor(dimension(config.beta_fast)), 0)
    high = min(math.ceil(dimension(config.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    scale = config.attention_factor
    if scale is None:
        scale = 0.1 * math.log(config.factor) + 1.0 if config.factor > 1 else 1.0
    return base / config.factor * interpolated + base * (1 - interpolated), scale
