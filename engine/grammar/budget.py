"""What masks may cost: a few characters of a regular expression can make each one take a second.

Every step waits for the masks of all its sequences, so one costly grammar would slow down whoever
runs beside it. Asked by state.py around all that a matcher does.
"""

import time
from collections.abc import Callable

from core.clock import Clock
from core.errors import InvalidRequestError

MEAN_S = 0.005
"""CPU time that a token may take on average. Those of real schemas and expressions take some tens
of microseconds."""
SPARE_S = 0.5
"""CPU time above that which an output may take in all, for a few costly places in it."""


class MaskBudget:
    """Of one output."""

    def __init__(self, cpu_clock: Clock = time.thread_time) -> None:
        """`cpu_clock`: seconds that this thread has computed; waiting, for whatever, is free."""
        self._clock = cpu_clock
        self._overdrawn_s = 0.0

    def spend(self, work: Callable[[], None], num_tokens: int) -> None:
        """Do the work on so many tokens.

        Raises:
            InvalidRequestError: so much was spent that there shall be no more.
        """
        began = self._clock()
        work()
        spent_s = self._clock() - began
        self._overdrawn_s = max(0.0, self._overdrawn_s + spent_s - MEAN_S * num_tokens)
        if self._overdrawn_s > SPARE_S:
            raise InvalidRequestError(
                "The structured output takes too long to follow; shorten the texts that its "
                "definition spells out, and avoid large counts of repetitions.",
                param="structured",
            )
