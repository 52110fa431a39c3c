"""Hash table of KV blocks in flat arrays: block key -> small integer, 12 bytes per slot.

Used by prefix_index.py alone. Whole prompts are looked up and whole events applied at once, which
is what makes arrays cheaper than a dict here: ten million blocks in a dict take 800 MB, and growing
it once stops the event loop for most of a second. A table that is full grows a slice at a time.

Open addressing. A key stays in its slot when its value goes back to 0, so that chains of probes
never break; growing leaves such keys behind.

Invariant: a key that is in both tables counts with what the newer one says.
"""

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
Values = NDArray[np.uint32]
Slots = NDArray[np.int64]

FIRST_CAPACITY = 1 << 12
FULLEST = 0.65
"""Part of the slots in use at which the table grows: three looks find a free one on average."""
MOST_CHANGED = 1024
"""Keys that one update may put in: the smallest table has room for these when it is to grow."""
SLICE = 1024
"""Slots of the old table that one update moves at least."""


class _Slots:
    """One generation of the table. Key 0 means that a slot is free."""

    def __init__(self, capacity: int) -> None:
        self.keys: Keys = np.zeros(capacity, np.uint64)
        self.values: Values = np.zeros(capacity, np.uint32)
        self.used = 0
        self._wrap = np.uint64(capacity - 1)

    def __len__(self) -> int:
        return len(self.keys)

    def probe(self, keys: Keys) -> Slots:
        """Where each key is, or the free slot where it would go.

        Steps get longer by one, which visits every slot of a table whose size is a power of two,
        and keeps the longest of many searches short. Source: Knuth, The Art of Computer
        Programming, volume 3, section 6.4.
        """
        slots = (keys & self._wrap).astype(np.int64)
        there = self.keys[slots]
        todo = np.flatnonzero((there != keys) & (there != 0))
        step = 0
        while len(todo):
            step += 1
            moved = (slots[todo] + step) & int(self._wrap)
            slots[todo] = moved
            there = self.keys[moved]
            todo = todo[(there != keys[todo]) & (there != 0)]
        return slots

    def insert(self, keys: Keys) -> Slots:
        """Slot of each key, taken if it had none."""
        slots = self.probe(keys)
        missing = np.flatnonzero(self.keys[slots] != keys)
        while len(missing):
            self.keys[slots[missing]] = keys[missing]
            # Of several keys that want one slot, the last got it; the others look further.
            beaten = missing[self.keys[slots[missing]] != keys[missing]]
            self.used += len(missing) - len(beaten)
            if len(beaten):
                slots[beaten] = self.probe(keys[beaten])
            missing = beaten[self.keys[slots[beaten]] != keys[beaten]]
        return slots


class BlockTable:
    """Keys to values; an absent key has value 0."""

    def __init__(self) -> None:
        self._now = _Slots(FIRST_CAPACITY)
        self._old: _Slots | None = None
        self._cursor = 0

    @property
    def num_bytes(self) -> int:
        """Memory of the table, both generations while it grows."""
        tables = [self._now] if self._old is None else [self._now, self._old]
        return sum(table.keys.nbytes + table.values.nbytes for table in tables)

    def get(self, keys: Keys) -> Values:
        """Value of each key."""
        slots = self._now.probe(keys)
        values = self._now.values[slots]
        if self._old is not None:
            missing = np.flatnonzero(self._now.keys[slots] != keys)
            if len(missing):
                values[missing] = self._old.values[self._old.probe(keys[missing])]
        return values

    def slots(self, keys: Keys) -> Slots:
        """Slots of at most MOST_CHANGED keys, which are put in if missing, for `read` and `write`.

        Valid until the next call. Call `tidy` before it.
        """
        assert len(keys) <= MOST_CHANGED
        if self._old is not None:
            self._bring(keys, self._old)
        return self._now.insert(keys)

    def read(self, slots: Slots) -> Values:
        """Values in slots."""
        return self._now.values[slots]

    def write(self, slots: Slots, values: Values) -> None:
        """Set the values in slots."""
        self._now.values[slots] = values

    def tidy(self, live: int, alive: NDArray[np.bool_], num_changed: int) -> Values:
        """Grow if it is time to, by one slice. Call it after every update.

        Args:
            live: keys whose value stands for something.
            alive: [values], False for values that stand for nothing any more; those keys go.
            num_changed: keys that the update touched.

        Returns:
            The values of the keys that went.
        """
        if self._old is None:
            if self._now.used <= FULLEST * len(self._now):
                return np.empty(0, np.uint32)
            capacity = len(self._now)
            # Four slots are moved for each key that is put in, so at most a quarter of the capacity
            # comes on top until all are moved: no more than FULLEST.
            while live > 0.4 * capacity:
                capacity *= 2
            self._old, self._now, self._cursor = self._now, _Slots(capacity), 0
        begin, end = self._cursor, self._cursor + SLICE + 4 * num_changed
        keys, values = self._old.keys[begin:end], self._old.values[begin:end]
        full = np.flatnonzero(keys)
        stays = alive[values[full]]
        gone = values[full[~stays]]
        values[full[~stays]] = 0
        self._bring(keys[full[stays]], self._old)
        self._cursor = end
        if end >= len(self._old):
            self._old = None
        return gone

    def _bring(self, keys: Keys, old: _Slots) -> None:
        """Move keys from the old generation, where they have a value there."""
        sources = old.probe(keys)
        values = old.values[sources]
        moving = np.flatnonzero(values)
        if len(moving):
            targets = self._now.insert(keys[moving])
            self._now.values[targets] = values[moving]
            old.values[sources[moving]] = 0
