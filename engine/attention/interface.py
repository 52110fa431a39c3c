"""What an attention backend does, and what it is told of a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionSpan:
    """Consecutive rows of a step that belong to one sequence."""

    start: int
    """Position of the first row in the sequence; everything before it is in the pool."""
    length: int
    """Rows, at least 1."""
    block_table: Sequence[int]
    """Blocks that hold positions [0, start + length), in order; more may follow."""

    @property
    def context_len(self) -> int:
        """Positions that the last row attends to."""
        return self.start + self.length


class AttentionStep(Protocol):
    """Attention of one step, for all layers in turn."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int
    ) -> torch.Tensor:
        """Write K and V of this step's tokens into the pool, then attend causally.

        Args:
            query: [T, num_heads, head_dim], rows in the order of the spans.
            key: [T, num_kv_heads, head_dim].
            value: [T, num_kv_heads, head_dim].
            layer: index of the layer.

        Returns:
            [T, num_heads * head_dim].
        """
        ...


class AttentionBackend(Protocol):
    """Makes one AttentionStep per step; whatever all layers share is computed there, once."""

    def plan(self, spans: Sequence[AttentionSpan]) -> AttentionStep:
        """Prepare a step. Fastest when single-row spans come first, ordered by context length."""
        ...
