"""Matrix products with fixed weights; where the weights' memory format is decided.

NOTE: on a CPU, decode is bound by reading weights, and the best format depends on the number of
rows. oneDNN's blocked format wins from three rows on; plain row-major wins below. A layer keeps
both when asked to pack: twice the memory for up to 1.8 times the speed (benchmarks/cpu_kernels.py
prints the table). On a GPU a few rows go through a kernel of our own, the rest through cuBLAS.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

from engine.cuda.products import FewRowsProduct, suits_few_rows
from engine.loader.source import WeightSource

_MIN_PACKED_ROWS = 3
_PACK_ROWS_HINT = 64
"""Rows that oneDNN chooses the blocked format for; 8 and 64 measured alike for all numbers."""


class Linear:
    """y = x W^T + b. Called with x [T, in_features], returns [T, out_features]."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, pack: bool = False
    ) -> None:
        """Keep the weights.

        Args:
            weight: [out_features, in_features].
            bias: [out_features] or None.
            pack: also keep a blocked copy for many rows; ignored where there is no kernel for it.
        """
        self.weight = weight
        self.bias = bias
        self._few_rows = FewRowsProduct(weight, bias) if suits_few_rows(weight) else None
        self._packed: torch.Tensor | None = None
        if pack and can_pack(weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_ROWS_HINT)
            self._packed_linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply to each row."""
        if self._few_rows is not None and self._few_rows.takes(x.shape[0]):
            return self._few_rows(x)
        if self._packed is None or x.shape[0] < _MIN_PACKED_ROWS:
            return functional.linear(x, self.weight, self.bias)
        y: torch.Tensor = self._packed_linear(x, self._packed, self.bias, "none", [], "")
        return y


def can_pack(weight: torch.Tensor) -> bool:
    """True if this build of torch has the blocked float32 kernels and the tensor suits them."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def load_linear(
    source: WeightSource,
    names: Sequence[str],
    out_features: Sequence[int],
    in_features: int,
    *,
    bias: bool,
    pack: bool,
    copies: Sequence[int] = (),
) -> Linear:
    """Load one or several projections of the same input as one.

    Args:
        source: where the weights come from.
        names: of the projections in the checkpoint, without `.weight`.
        out_features: rows of each; the outputs are concatenated in this order.
        in_features: columns of all.
        bias: whether they have biases.
        pack: see `Linear`.
        copies: of each, see `WeightSource.get`; empty: none is copied.
    """
    copies = copies or [1] * len(names)
    weights = [
        source.get(f"{name}.weight", rows, in_features, copies=count)
        for name, rows, count in zip(names, out_features, copies, strict=True)
    ]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if not bias:
        return Linear(weight, pack=pack)
    biases = [
        source.get(f"{name}.bias", rows, copies=count)
        for name, rows, count in zip(names, out_features, copies, strict=True)
    ]
    return Linear(weight, torch.cat(biases), pack=pack)
