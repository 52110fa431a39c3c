"""How often something happens, as an exponentially weighted mean. Pure: time is an argument."""

import math


class MeanRate:
    """Events per second over about the last `window_s`."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._weight = 0.0
        self._at = 0.0

    def count(self, now: float, events: float = 1.0) -> None:
        """Something happened."""
        self._weight = self._decayed(now) + events
        self._at = now

    def per_s(self, now: float) -> float:
        """Events per second."""
        return self._decayed(now) / self._window_s

    def _decayed(self, now: float) -> float:
        return self._weight * math.exp(-max(0.0, now - self._at) / self._window_s)
