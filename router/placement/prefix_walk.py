"""How far along a prompt each worker's blocks reach, from the sets of holders along it.

Used by prefix_index.py, which says what a mask is: one byte per worker (its row). A set of rows is
a mask with the lowest bit of each of their bytes; all rows are handled by a few operations on large
integers, whose cost hardly grows with their number.

Invariant: a row is either going or stopped, or has none of the prompt.
"""

from collections.abc import Iterator
from typing import NamedTuple

ROW_BITS = 8
LOWER = 0b00111110
"""Tiers below the device, of one row."""
AT_HAND = 0xFF & ~LOWER
"""On the device, or about to be."""


class Held(NamedTuple):
    """What a worker has of the beginning of a prompt."""

    blocks: int
    lower: int = 0
    """Of those, blocks that it must copy to the device first; of long prompts, about."""


class PrefixWalk:
    """Follows all rows at once, from the first block on."""

    def __init__(self, num_rows: int) -> None:
        self._rows = int.from_bytes(bytes([1]) * num_rows, "little")
        self.going = self._rows
        """Rows that have all blocks so far."""
        self._stopped: dict[int, int] = {}
        self._lower: list[tuple[int, int]] = []

    def over(self, mask: int, begin: int, end: int) -> None:
        """Blocks from `begin` to `end` are held as `mask` says; all that go stand at `begin`."""
        held = self._any(mask)
        if self.going & ~held:
            self._stop(self.going & ~held, begin)
            self.going &= held
        if mask & self._rows * LOWER:
            lower = self.going & ~self._any(mask & self._rows * AT_HAND)
            if lower:
                self._lower.append((lower, end - begin))

    def stop(self, end: int) -> None:
        """There are no blocks from `end` on."""
        self._stop(self.going, end)
        self.going = 0

    @property
    def stops(self) -> list[int]:
        """Where rows stopped that have some of the prompt."""
        return list(self._stopped)

    def resume(self, begin: int) -> None:
        """Let the rows that stopped at `begin` go on from there, when no others go."""
        assert not self.going
        self.going = self._stopped.pop(begin)

    def result(self) -> Iterator[tuple[int, Held]]:
        """Rows that have some of the prompt. For when none goes any more."""
        lower: dict[int, int] = {}
        for rows, blocks in self._lower:
            for row in _numbers(rows):
                lower[row] = lower.get(row, 0) + blocks
        for end, rows in self._stopped.items():
            for row in _numbers(rows):
                yield row, Held(end, lower.get(row, 0))

    def _stop(self, rows: int, end: int) -> None:
        if rows and end:
            self._stopped[end] = self._stopped.get(end, 0) | rows

    def _any(self, mask: int) -> int:
        """Rows of which any bit is set."""
        mask |= mask >> 4
        mask |= mask >> 2
        return (mask | mask >> 1) & self._rows


def _numbers(rows: int) -> Iterator[int]:
    for row, bit in enumerate(rows.to_bytes(-(-rows.bit_length() // ROW_BITS), "little")):
        if bit:
            yield row
