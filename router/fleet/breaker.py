"""A circuit breaker: from what went well and what failed, whether to go on trusting something.

Pure: no clock, no I/O. `breakers.py` keeps one per worker and per pair of workers. States:

    CLOSED     trusted; `failures` in a row, none of them older than `window_s`, open it
    OPEN       not to be used for a time that doubles with every opening in a row
    HALF_OPEN  that time is over: one request at a time is let through to try, and its end decides

Invariant: work that began before the latest failure was seen is no news. Many requests that fail
together count once, and what ends well late does not speak for what has failed since.
Source: M. Nygard, "Release It!" (2007), ch. 5.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import inf


class BreakerState(StrEnum):
    """See the module."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """When a breaker opens and for how long. Seconds."""

    failures: int
    window_s: float
    open_s: float
    """The first time."""
    open_max_s: float


class Breaker:
    """One thing's record. All moments are of one monotonic clock; `now` never goes back."""

    def __init__(self, limits: BreakerLimits) -> None:
        self._limits = limits
        self._failed_at = -inf
        self._opened_for_s = 0.0
        """Of the latest opening since it was last closed; 0: there was none."""
        self._open_until = -inf
        self._trial_until = -inf
        self.failures = 0
        """In a row."""
        self.cause = ""
        """Of the latest failure."""

    def state(self, now: float) -> BreakerState:
        """See the module."""
        if not self._opened_for_s:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._open_until else BreakerState.HALF_OPEN

    def admits(self, now: float) -> bool:
        """True if a request may be placed now."""
        return not self.retry_in_s(now)

    def retry_in_s(self, now: float) -> float:
        """Seconds until `admits`, if nothing happens before; 0 if it does now."""
        return max(0.0, self._open_until - now, self._trial_until - now)

    def placed(self, now: float) -> None:
        """A request was placed. Of a half-open one it is the trial.

        A trial that never ends, for a client may leave, is given up after the latest open time.
        """
        if self.state(now) is BreakerState.HALF_OPEN:
            self._trial_until = now + self._opened_for_s

    def succeeded(self, began_at: float) -> None:
        """Work that began at `began_at` ended well."""
        if began_at >= self._failed_at:
            self.failures = 0
            self._opened_for_s = 0.0
            self._open_until = self._trial_until = -inf

    def failed(self, began_at: float, now: float, cause: str) -> bool:
        """Work that began at `began_at` has failed; True if that opens it."""
        if began_at < self._failed_at:
            return False
        if now - self._failed_at > self._limits.window_s:
            self.failures = 0
        self._failed_at = now
        self.failures += 1
        self.cause = cause
        state = self.state(now)
        if state is BreakerState.OPEN:
            return False  # it was used although it is open: there was nothing else
        if state is BreakerState.CLOSED and self.failures < self._limits.failures:
            return False
        doubled = 2 * self._opened_for_s or self._limits.open_s
        self._opened_for_s = min(doubled, self._limits.open_max_s)
        self._open_until = now + self._opened_for_s
        self._trial_until = -inf
        return True

    def forgettable(self, now: float) -> bool:
        """True if a new one would act alike, or nothing has been heard for so long that it may.

        What has gone for good must not be remembered for good.
        """
        quiet_s = now - self._failed_at
        if self.state(now) is BreakerState.CLOSED:
            return not self.failures or quiet_s > self._limits.window_s
        return quiet_s > self._limits.window_s + 2 * self._limits.open_max_s
