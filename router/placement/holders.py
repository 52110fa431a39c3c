"""Sets of holders, each kept once: what the values of a BlockTable stand for.

A block is held by few workers and blocks of one prompt by the same ones, so there are far fewer
sets than blocks. A set is an int with one byte per worker (its row), one bit per way of holding;
taking a worker out of every set takes a pass over the sets, not over the blocks.

Used by prefix_index.py alone. Invariant: set 0 is empty; a set that no block has is forgotten.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]


class HolderSets:
    """Sets by id, with the number of blocks that each stands at."""

    def __init__(self) -> None:
        self._masks = [0]
        self._blocks = [0]
        self._ids = {0: 0}
        self._free: list[int] = []
        self.alive: NDArray[np.bool_] = np.zeros(1, np.bool_)
        """Per id: is anybody in the set?"""
        self.live = 0
        """Blocks that somebody holds."""

    def __len__(self) -> int:
        """Distinct sets."""
        return len(self._masks) - len(self._free)

    def mask(self, set_id: int) -> int:
        """The holders in a set."""
        return self._masks[set_id]

    def change(self, ids: Ids, edit: Callable[[int], int]) -> Ids:
        """Ids of the sets that blocks are in after `edit` was applied to their masks.

        Args:
            ids: one per block, at least one.
            edit: mask before -> mask after.
        """
        # Blocks of one prompt are mostly held by the same workers: there are few runs of equal ids.
        begins = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist()]
        lengths = [end - begin for begin, end in pairwise([*begins, len(ids)])]
        runs = [int(ids[begin]) for begin in begins]
        counts: dict[int, int] = {}
        for set_id, length in zip(runs, lengths, strict=True):
            counts[set_id] = counts.get(set_id, 0) + length
        moved = {set_id: self._move(set_id, count, edit) for set_id, count in counts.items()}
        return np.repeat(np.array([moved[each] for each in runs], np.uint32), lengths)

    def release(self, ids: Ids) -> None:
        """Blocks in these sets are forgotten; ids of empty sets only."""
        for set_id, count in zip(*np.unique(ids[ids != 0], return_counts=True), strict=True):
            self._leave(int(set_id), int(count))

    def strip(self, bits: int) -> None:
        """Take bits out of every set."""
        for set_id, mask in enumerate(self._masks):
            if mask & bits and self._blocks[set_id]:
                if self._ids.get(mask) == set_id:
                    del self._ids[mask]
                left = self._masks[set_id] = mask & ~bits
                if left:
                    # Another id may stand for the same holders already; both go on.
                    self._ids.setdefault(left, set_id)
                else:
                    self.alive[set_id] = False
                    self.live -= self._blocks[set_id]

    def _move(self, source: int, count: int, edit: Callable[[int], int]) -> int:
        before = self._masks[source]
        after = edit(before)
        if after == before:
            return source
        target = self._intern(after)
        self.live += count * ((after != 0) - (before != 0))
        if target:
            self._blocks[target] += count
        if source:
            self._leave(source, count)
        return target

    def _intern(self, mask: int) -> int:
        set_id = self._ids.get(mask)
        if set_id is not None:
            return set_id
        if self._free:
            set_id = self._free.pop()
            self._masks[set_id] = mask
        else:
            set_id = len(self._masks)
            self._masks.append(mask)
            self._blocks.append(0)
            if set_id == len(self.alive):
                self.alive = np.concatenate([self.alive, np.zeros(set_id, np.bool_)])
        self.alive[set_id] = True
        self._ids[mask] = set_id
        return set_id

    def _leave(self, set_id: int, count: int) -> None:
        self._blocks[set_id] -= count
        if not self._blocks[set_id]:
            if self._ids.get(self._masks[set_id]) == set_id:
                del self._ids[self._masks[set_id]]
            self._masks[set_id] = 0
            self.alive[set_id] = False
            self._free.append(set_id)
