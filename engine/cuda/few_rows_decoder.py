"""The decoder for steps of few rows: the same layers in fewer kernels.

Norms, gates and residual additions are parts of the products before or after them, so a layer is
four products, the preparation of q, k and v, and attention. It computes what DecoderModel does, but
rounds less often: normed activations and what is added to the residual stream stay in float32.
"""

from dataclasses import dataclass

import torch

from engine.cuda.kernels.few_rows import few_rows, suits
from engine.cuda.kernels.gemv import gemv
from engine.cuda.kernels.product import Product
from engine.layers.context import ForwardContext
from engine.layers.decoder import DecoderLayer, DecoderModel
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm

MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: Product
    output: Product
    gate_up: Product
    down: Product
    norms: tuple[RMSNorm, RMSNorm] | None


class FewRowsDecoder:
    """Views of a model's weights; computes steps in which every row is wanted."""

    def __init__(self, model: DecoderModel, head_dim: int) -> None:
        """Bind to a model in 16 bits on a GPU with Triton."""
        self._model = model
        self._group = model.group
        self._head_dim = head_dim
        self._layers = [self._products(layer) for layer in model.layers]
        self._head = _product(model.lm_head, model.norm)
        products = [
            product
            for layer in self._layers
            for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
        ]
        self._tiled = all(map(suits, [*products, self._head]))

    def takes(self, rows: int) -> bool:
        """Whether `logits` can compute so many rows."""
        return rows == 1 or (self._tiled and rows <= MAX_ROWS)

    def logits(self, token_ids: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T] -> [T, vocab_size]; writes K and V of all rows into the pool."""
        hidden = self._model.embed(token_ids)
        for index, layer in enumerate(self._layers):
            qkv = _compute(layer.qkv, hidden).view(len(hidden), -1, self._head_dim)
            attended = context.attend(qkv, layer.norms, index)
            self._add_(hidden, layer.output, attended)
            self._add_(hidden, layer.down, _compute(layer.gate_up, hidden))
        return self._model.gathered(_compute(self._head, hidden))

    def _add_(self, hidden: torch.Tensor, product: Product, x: torch.Tensor) -> None:
        if product.add:
            _run(product, x, hidden)
        else:
            hidden.add_(self._group.all_reduce_(_compute(product, x)))

    def _products(self, layer: DecoderLayer) -> _Layer:
        # With several ranks each has a part of the sum, so the residual comes after.
        alone = self._group.size == 1
        return _Layer(
            qkv=_product(layer.attention.qkv, layer.input_norm),
            output=_product(layer.attention.output, add=alone),
            gate_up=_product(layer.mlp.gate_up, layer.mlp_norm, gated=True),
            down=_product(layer.mlp.down, add=alone),
            norms=layer.attention.norms,
        )


def _product(
    linear: Linear, norm: RMSNorm | None = None, *, gated: bool = False, add: bool = False
) -> Product:
    return Product(
        weight=linear.weight,
        bias=linear.bias,
        norm_weight=None if norm is None else norm.weight,
        eps=0.0 if norm is None else norm.eps,
        gated=gated,
        add=add,
    )


def _compute(product: Product, x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(len(x), product.out_features)
    _run(product, x, out)
    return out


def _run(product: Product, x: torch.Tensor, out: torch.Tensor) -> None:
    if len(x) == 1:
        gemv(product, x, out)
    else:
        few_rows(product, x, out)
