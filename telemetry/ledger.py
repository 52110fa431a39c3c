"""Accounts for a span of time, stage by stage, without a gap or an overlap.

Used by whoever holds the clock of a span (the router, for a request). Times that another process
measured are durations and may disagree with this clock; they are cut to fit. Invariant: stages are
never negative and sum to the span (to rounding of the float additions).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the span."""

    name: str
    seconds: float
    attempt: int


class StageLedger:
    """Stages of one span, added in order of time."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._at = started_at
        self.stages: list[Stage] = []
        self.unattributed_s = 0.0
        """Part of the span whose cause is unknown."""
        self.overrun_s = 0.0
        """Seconds that others reported beyond what there was, and that were cut."""

    @property
    def total_s(self) -> float:
        """Length of the span so far."""
        return self._at - self._started_at

    def advance(
        self,
        until: float,
        rest: str,
        *,
        parts: Mapping[str, float] | None = None,
        attempt: int = 0,
        known: bool = True,
    ) -> None:
        """Account for the time since the last call.

        Args:
            until: end of the interval, in the clock of `started_at`; an earlier one than the last
                counts as the same.
            rest: stage that gets what `parts` leave.
            parts: stages measured elsewhere, in seconds. If they exceed the interval, all shrink in
                proportion.
            attempt: number that the stages carry; 0: none.
            known: False if nobody can say what happened in the rest.
        """
        interval = max(0.0, until - self._at)
        self._at = max(until, self._at)
        measured = {name: max(0.0, seconds) for name, seconds in (parts or {}).items()}
        claimed = sum(measured.values())
        scale = 1.0
        if claimed > interval:
            self.overrun_s += claimed - interval
            scale = interval / claimed
        for name, seconds in measured.items():
            self.stages.append(Stage(name, seconds * scale, attempt))
        left = max(0.0, interval - claimed * scale)
        self.stages.append(Stage(rest, left, attempt))
        if not known:
            self.unattributed_s += left
