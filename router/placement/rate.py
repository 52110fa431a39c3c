"""How often things happen, as exponentially weighted counts. Pure: time is an argument."""

import math
from collections import OrderedDict


class RecentCount:
    """Events of about the last `window_s`: each weighs less the longer it is ago."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._weight = 0.0
        self._at = 0.0

    def add(self, now: float) -> None:
        """Something happened."""
        self._weight = self.count(now) + 1
        self._at = now

    def count(self, now: float) -> float:
        """Events, old ones in part."""
        return self._weight * math.exp(-max(0.0, now - self._at) / self._window_s)

    def per_s(self, now: float) -> float:
        """Events per second."""
        return self.count(now) / self._window_s


class RecentCounts:
    """A RecentCount for each of the keys that were seen last, `capacity` of them."""

    def __init__(self, window_s: float, capacity: int) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._counts: OrderedDict[bytes, RecentCount] = OrderedDict()

    def add(self, key: bytes, now: float) -> float:
        """Something happened to `key`; returns how often it did recently, this time not counted."""
        counter = self._counts.setdefault(key, RecentCount(self._window_s))
        self._counts.move_to_end(key)
        if len(self._counts) > self._capacity:
            self._counts.popitem(last=False)
        before = counter.count(now)
        counter.add(now)
        return before
