"""What every layer of one forward pass shares. Built by the runner, passed down explicitly."""

from dataclasses import dataclass

import torch

from engine.attention.interface import AttentionStep


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Facts of one step; T is its number of tokens."""

    cos: torch.Tensor
    """[T, 1, head_dim], for each token's position."""
    sin: torch.Tensor
    """Same, signed as `RotaryEmbedding.rows` gives it."""
    attention: AttentionStep
