"""What the ranks of one model do together: sum, gather, agree on a number.

Layers get a group when they are built and call it in every forward pass; with one rank it does
nothing. Every rank makes the same calls in the same order with tensors of the same shapes.
"""

from typing import Protocol

import torch


class RankGroup(Protocol):
    """The ranks that share one model, as one of them sees it."""

    @property
    def rank(self) -> int:
        """Which of them this is, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a contiguous tensor by the sum over all ranks, bit for bit the same on each.

        The tensor is not empty: whoever has the sum knows that every rank came this far.

        On a GPU it is queued on the current stream without synchronising, and may be captured in a
        CUDA graph.

        Returns:
            The same tensor.
        """
        ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[N, part] of every rank -> [N, size * part], in the order of the ranks. Else as above."""
        ...

    def smallest(self, value: int) -> int:
        """The smallest of all ranks' values. Waits for every rank while it loads; not for steps.

        Raises:
            WorkerLostError: not every rank came.
        """
        ...

    def close(self) -> None:
        """Leave the group. Idempotent; collectives under way fail."""
        ...


class Alone:
    """The group of a model on one device."""

    rank = 0
    size = 1

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """See RankGroup."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """See RankGroup."""
        return tensor

    def smallest(self, value: int) -> int:
        """See RankGroup."""
        return value

    def close(self) -> None:
        """See RankGroup."""
