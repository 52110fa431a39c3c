"""Root-mean-square normalisation."""

import torch
from torch.nn import functional

from engine.loader.source import WeightSource


class RMSNorm:
    """x / rms(x) * weight over the last dimension.

    Source: arXiv:1910.07467.
    """

    def __init__(self, source: WeightSource, name: str, size: int, eps: float) -> None:
        """Load `name`.weight, [size]."""
        self._weight = source.get(f"{name}.weight", size)
        self._shape = (size,)
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise; same shape."""
        return functional.rms_norm(x, self._shape, self._weight, self._eps)
