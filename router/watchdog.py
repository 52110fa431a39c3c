"""Tells a request that a worker has forgotten from one that waits its turn at a busy worker.

Pure: no timers, no I/O. Fed by dispatch with what workers do, asked by the lifecycle of runs once a
stage of a request has taken longer than its budget. Time alone proves nothing, for under overload
everything is late; a stage is stuck only if its worker meanwhile

- served others that came later, several in a row, or
- did nothing for anybody, although what it says of itself is well.

What is taken to another worker is a trial: it proves the verdict right if it is served there within
its new budget. Only so many trials run at a time as the latest ones were right.

Invariant: an overloaded fleet that works in order is left alone, and evidence that deceives moves
one request at a time.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from router.fleet.worker import WorkerLoad

OVERTAKERS = 4
"""Requests that were served one after the other though all of them came later.

Source: own judgement: one or two may be shorter, or have more of their prompt cached.
"""
PATIENCE = 2.0
"""A stage may take as many times what placement predicted for the whole request."""
DEADLINE_SHARE = 1 / 3
"""Of the time that a request has left, after which another worker could still do it."""
MIN_BUDGET_S = 3.0
"""However short the deadline: a step of a healthy engine may take as long."""
MAX_TRIALS = 64
"""At a time. The first one is alone; each that was right doubles what is allowed, each that was
wrong begins anew."""


class Stage(StrEnum):
    """What a request waits for at one worker."""

    FIRST_TOKEN = "first_token"
    """Accepted, its turn, the prompt computed, a first token."""
    TRANSFER = "transfer"
    """The KV at decode, and a first token of decode's own."""


@dataclass(frozen=True, slots=True)
class Watch:
    """One stage of one request under way."""

    stage: Stage
    worker: str
    began_at: float
    """Monotonic seconds."""


class Watchdog:
    """See the module. Owned by one event loop."""

    def __init__(self, stuck_after_s: float) -> None:
        """`stuck_after_s`: least budget of a stage where the deadline leaves as much."""
        self._stuck_after_s = stuck_after_s
        self._worked_at: dict[str, float] = {}
        """Worker to when it last did something for anybody."""
        self._loads: dict[str, WorkerLoad] = {}
        self._served: dict[tuple[str, Stage], deque[float]] = {}
        """Worker and stage to when the latest ones began that it has brought through."""
        self._trials = 0
        self._allowed = 1

    def worked(self, worker: str, now: float) -> None:
        """A worker brought something forward: a token, a part of a prompt, an end."""
        self._worked_at[worker] = now

    def reported(self, worker: str, load: WorkerLoad, now: float) -> None:
        """A load report, which shows work on a long prompt or hand-over before a token of it."""
        before = self._loads.get(worker, load)
        self._loads[worker] = load
        if (
            load.backlog_tokens < before.backlog_tokens
            or load.held_blocks != before.held_blocks
            or load.link_bytes_per_s != before.link_bytes_per_s
        ):
            self.worked(worker, now)

    def lost(self, worker: str) -> None:
        """A worker is gone."""
        self._worked_at.pop(worker, None)
        self._loads.pop(worker, None)
        for stage in Stage:
            self._served.pop((worker, stage), None)

    def served(self, watch: Watch) -> None:
        """A stage is over."""
        key = watch.worker, watch.stage
        self._served.setdefault(key, deque(maxlen=OVERTAKERS)).append(watch.began_at)

    def budget_s(self, watch: Watch, *, predicted_s: float, deadline: float) -> float:
        """How long a stage may take before it is looked at.

        Args:
            watch: the stage.
            predicted_s: what placement expected of the whole request.
            deadline: of the request, monotonic seconds.
        """
        share_s = max(MIN_BUDGET_S, DEADLINE_SHARE * (deadline - watch.began_at))
        return max(PATIENCE * predicted_s, min(self._stuck_after_s, share_s))

    def verdict(self, watch: Watch, budget_s: float, now: float) -> str:
        """Why a stage that has used its budget up is stuck; empty: its worker is busy."""
        if now < watch.began_at + budget_s:
            return ""
        served = self._served.get((watch.worker, watch.stage), ())
        if len(served) == OVERTAKERS and min(served) > watch.began_at:
            return "others that came later were served"
        if now - self._worked_at.get(watch.worker, -inf) >= budget_s:
            return "the worker does nothing, though it says that it is well"
        return ""

    def try_elsewhere(self) -> bool:
        """True if one more stuck request may go to another worker now; each ends in `tried`."""
        if self._trials >= self._allowed:
            return False
        self._trials += 1
        return True

    def tried(self, right: bool | None) -> None:
        """A trial is over; None: it ended without telling."""
        self._trials -= 1
        if right is not None:
            self._allowed = min(2 * self._allowed, MAX_TRIALS) if right else 1
