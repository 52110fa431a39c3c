"""Root-mean-square normalisation."""

import math

import torch

from engine.cuda.support import has_triton
from engine.loader.source import WeightSource


class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Source: arXiv:1910.07467. In float32 computed as x * (weight * sqrt(n)) / hypot(|x|, sqrt(n *
    eps)), the same in four operations instead of torch's eight: in a decode step on a CPU each
    operation costs more than its arithmetic. Narrower types are normalised in float32.
    """

    def __init__(self, source: WeightSource, name: str, size: int, eps: float) -> None:
        """Load `name`.weight, [size]."""
        self.weight = source.get(f"{name}.weight", size)
        self.eps = eps
        self.scaled_weight = self.weight * math.sqrt(size)
        device = self.weight.device
        self._floor = torch.tensor(math.sqrt(size * eps), dtype=self.weight.dtype, device=device)
        self._fused = has_triton(device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; same shape."""
        if self._fused:
            from engine.cuda.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.dtype != torch.float32:
            wide = x.float()
            scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
            return (wide * scale).to(x.dtype) * self.weight
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)
        return torch.mul(x, self.scaled_weight).div_(norm)

    def add_(self, hidden: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """Add `delta` to `hidden` in place and normalise the sum. All [T, size]."""
        if self._fused:
            from engine.cuda.kernels.norm import add_rms_norm_

            return add_rms_norm_(hidden, delta, self.weight, self.eps)
        return self(hidden.add_(delta))
