"""Hash table of KV blocks in flat arrays: block key -> small integer, 12 bytes per slot.

Used by prefix_index.py alone. Whole prompts are looked up and whole events applied at once, which
is what makes arrays cheaper than a dict here: ten million blocks in a dict take 800 MB, and growing
it once stops the event loop for most of a second.

A key belongs to one group of slots, named by its highest bits, and is found by open addressing
within that group, from the slot that the next bits name. So a table that is full grows by moving
group after group, in order, into a larger one: each update moves a few, the memory that they move
to is touched for the first time slice by slice, and a key is always in exactly one of the two.

A key stays in its slot when its value goes back to 0, so that chains of probes never break; moving
its group leaves it behind. Invariant: a group is never moved into one that holds anything.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Values = NDArray[np.uint32]
Slots = NDArray[np.int64]

GROUP = 1024
"""Slots of a group. At 0.8 of them in use on average, none of millions of groups is full by chance:
that would be seven standard deviations."""
FIRST_CAPACITY = 16 * GROUP
FULLEST = 0.65
"""Part of the slots in use at which the table grows: three looks find a free one on average."""
CLEANED = 0.4
"""Part of them with a value up to which it is enough to leave the others behind."""
MOVED_PER_KEY = 10
"""Slots that are to be moved for each key of updates since growing began: groups that are moved
last are at most a tenth fuller then."""
MOST_BEHIND = 1 / 8
"""Part of the slots by which that may be late."""
SLICE = 2
"""Groups that an update in no hurry moves, beside twice what is due for its own keys."""


class _Slots:
    """One generation of the table. Key 0 means that a slot is free."""

    def __init__(self, capacity: int) -> None:
        self.keys: Keys = np.zeros(capacity, np.uint64)
        self.values: Values = np.zeros(capacity, np.uint32)
        self.used = 0
        self._shift = np.uint64(65 - capacity.bit_length())

    def __len__(self) -> int:
        return len(self.keys)

    def home(self, keys: Keys) -> Slots:
        """The slot of its group where the search for each key begins."""
        return (keys >> self._shift).astype(np.int64)

    def probe(self, keys: Keys) -> Slots:
        """Where each key is, or the free slot where it would go; any slot if its group is full.

        Steps get longer by one, which visits every slot of a group whose size is a power of two,
        and keeps the longest of many searches short. Source: Knuth, The Art of Computer
        Programming, volume 3, section 6.4.
        """
        slots = self.home(keys)
        there = self.keys[slots]
        todo = np.flatnonzero((there != keys) & (there != 0))
        for step in range(1, GROUP):
            if not len(todo):
                break
            before = slots[todo]
            moved = before & -GROUP | before + step & GROUP - 1
            slots[todo] = moved
            there = self.keys[moved]
            todo = todo[(there != keys[todo]) & (there != 0)]
        return slots

    def insert(self, keys: Keys) -> Slots:
        """Slots of the keys, taken if they had none, aligned; -1 for those whose group is full."""
        slots = self.probe(keys)
        missing = np.flatnonzero(self.keys[slots] != keys)
        while len(missing):
            free = self.keys[slots[missing]] == 0
            slots[missing[~free]] = -1
            missing = missing[free]
            self.keys[slots[missing]] = keys[missing]
            # Of several keys that want one slot, the last got it; the others look further.
            beaten = missing[self.keys[slots[missing]] != keys[missing]]
            self.used += len(missing) - len(beaten)
            slots[beaten] = self.probe(keys[beaten])
            missing = beaten[self.keys[slots[beaten]] != keys[beaten]]
        return slots


class BlockTable:
    """Keys to values; an absent key has value 0. Keys are expected to be evenly spread."""

    def __init__(self) -> None:
        self._now = _Slots(FIRST_CAPACITY)
        self._old: _Slots | None = None
        self._cursor = 0
        """Groups of `_old` that were moved."""
        self._due = 0
        """Slots of `_old` that are to be moved by now."""

    @property
    def num_bytes(self) -> int:
        """Memory of the table, both generations while it grows."""
        tables = [self._now] if self._old is None else [self._now, self._old]
        return sum(table.keys.nbytes + table.values.nbytes for table in tables)

    @property
    def most_changed(self) -> int:
        """Keys that one update may put in: there is room for them when the table is to grow."""
        return len(self._now) // 16

    def get(self, keys: Keys) -> Values:
        """Value of each key."""
        values = np.zeros(len(keys), np.uint32)
        for table, places in self._parts(keys):
            wanted = keys[places]
            slots = table.probe(wanted)
            values[places] = np.where(table.keys[slots] == wanted, table.values[slots], 0)
        return values

    def change(self, keys: Keys, edit: Callable[[Values], Values]) -> None:
        """Put `edit` of their values in place of those of at most `most_changed` keys.

        Keys that are missing are put in with value 0 before. Should a group be full, which does not
        happen by chance, keys of it that are missing stay so. Call `tidy` after it.
        """
        assert len(keys) <= self.most_changed
        for table, places in self._parts(keys):
            slots = table.insert(keys[places])
            slots = slots[slots >= 0]
            if len(slots):
                table.values[slots] = edit(table.values[slots])

    def tidy(
        self, live: int, alive: NDArray[np.bool_], num_changed: int, *, hurried: bool
    ) -> Values:
        """Grow if it is time to, by a few groups. Call it after every update.

        Args:
            live: keys whose value stands for something.
            alive: [values], False for values that stand for nothing any more; those keys go.
            num_changed: keys that the update touched.
            hurried: move only what is long due.

        Returns:
            The values of the keys that went.
        """
        if self._old is None:
            if self._now.used <= FULLEST * len(self._now):
                return np.empty(0, np.uint32)
            capacity = len(self._now) * (2 if live > CLEANED * len(self._now) else 1)
            self._old, self._now = self._now, _Slots(capacity)
            self._cursor = self._due = 0
        own = MOVED_PER_KEY * num_changed
        self._due += own
        begin = end = self._cursor
        if not hurried:
            end += SLICE + 2 * own // GROUP
        end = max(end, (self._due - int(MOST_BEHIND * len(self._old))) // GROUP)
        self._cursor = end
        if begin == end:
            return np.empty(0, np.uint32)
        moving = slice(begin * GROUP, end * GROUP)
        keys, values = self._old.keys[moving], self._old.values[moving]
        full = np.flatnonzero(values)
        stays = alive[values[full]]
        gone = values[full[~stays]]
        keys, values = keys[full[stays]], values[full[stays]]
        self._now.values[self._now.insert(keys)] = values
        if end * GROUP >= len(self._old):
            self._old = None
        return gone

    def _parts(self, keys: Keys) -> Iterator[tuple[_Slots, slice | NDArray[np.bool_]]]:
        """Each generation with those of the keys that are or would be in it."""
        if self._old is None:
            yield self._now, slice(None)
            return
        moved = self._old.home(keys) < self._cursor * GROUP
        if moved.any():
            yield self._now, moved
        if not moved.all():
            yield self._old, ~moved
