"""What every layer of one forward pass shares. Built by the runner, passed down explicitly."""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.attention.interface import AttentionStep
from engine.layers.norm import RMSNorm
from engine.layers.rope import rotate_


class ForwardContext(Protocol):
    """Facts of one step of T tokens, and the part of a layer that looks at other tokens."""

    @property
    def output_rows(self) -> torch.Tensor | None:
        """[N] int64, rows whose hidden state is wanted after the last layer; None: all."""
        ...

    def attend(
        self, qkv: torch.Tensor, norms: tuple[RMSNorm, RMSNorm] | None, layer: int
    ) -> torch.Tensor:
        """Normalise q and k where the model does, rotate them, write K and V, attend.

        One method, because on a GPU all before attention is one kernel.

        Args:
            qkv: [T, num_heads + 2 * num_kv_heads, head_dim], as projected; may be written.
            norms: of q and of k over head_dim, or None.
            layer: index of the layer.

        Returns:
            [T, num_heads * head_dim].
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchContext:
    """The ForwardContext in torch operations, on any device."""

    cos: torch.Tensor
    """[T, 1, head_dim], for each token's position."""
    sin: torch.Tensor
    """Same, signed as `RotaryEmbedding.rows` gives it."""
    attention: AttentionStep
    num_heads: int
    num_kv_heads: int
    output_rows: torch.Tensor | None = None

    def attend(
        self, qkv: torch.Tensor, norms: tuple[RMSNorm, RMSNorm] | None, layer: int
    ) -> torch.Tensor:
        """See ForwardContext."""
        num_rotated = self.num_heads + self.num_kv_heads
        query = qkv[:, : self.num_heads]
        key = qkv[:, self.num_heads : num_rotated]
        if norms:
            query.copy_(norms[0](query))
            key.copy_(norms[1](key))
        rotate_(qkv[:, :num_rotated], self.cos, self.sin)
        return self.attention.forward(query, key, qkv[:, num_rotated:], layer)
