"""Who is served next: the router's bounded queue. Admission decides, dispatch sends.

A request waits here, where order can still change, while as many run as may, or while every worker
has enough to compute. Classes of priority are served strictly one after the other; within a class
every key gets its turn by the tokens that it asked for, so that one caller's flood delays only
itself. Who can't be served by its deadline is told so at once, with the wait that is predicted.

Owned by dispatch, on one event loop. Pure: time is an argument.
Source of the turns: start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996), weights equal.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count

from core.errors import ErrorCode, InvalidRequestError, OverloadedError
from router.generation import GenerationRequest, ServedModel

DURATION_WEIGHT = 0.1
"""Weight of the latest request in the mean duration that waits are predicted from."""
FIRST_DURATION_S = 1.0
"""Duration assumed until a request has ended. Source: own judgement."""
RETRY_AFTER_S = (1.0, 60.0)
"""Least and most that a client is told to wait."""


class Priority(IntEnum):
    """Classes, the first served first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """A request in the queue."""

    request_id: str
    key: str
    """Whose it is."""
    priority: Priority
    tokens: int
    """What it asks for: prompt and output."""
    deadline: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Intent of the operator."""

    max_running: int
    max_queued: int
    max_backlog_s: float
    """Work that the least busy worker may have while more is sent to workers."""


@dataclass(slots=True)
class _Class:
    """The waiting requests of one priority."""

    queues: dict[str, deque[Ticket]] = field(default_factory=dict)
    starts: list[tuple[float, int, str]] = field(default_factory=list)
    """Heap with one entry per key in `queues`: virtual time of its next turn, order, key."""
    clock: float = 0.0
    """Virtual time: tokens served to each key that was always there."""
    ends: dict[str, float] = field(default_factory=dict)
    """Virtual time at which what each key was given ends; of keys that are ahead of the clock."""
    order: "count[int]" = field(default_factory=count)

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def push(self, ticket: Ticket) -> None:
        queue = self.queues.setdefault(ticket.key, deque())
        queue.append(ticket)
        if len(queue) == 1:
            self._line_up(ticket.key)

    def pop(self) -> Ticket | None:
        while self.starts:
            start, _, key = heapq.heappop(self.starts)
            if key not in self.queues:
                continue  # all of it has left the queue
            queue = self.queues[key]
            ticket = queue.popleft()
            self.clock = max(self.clock, start)
            self.ends[key] = start + ticket.tokens
            self.ends = {each: end for each, end in self.ends.items() if end > self.clock}
            if queue:
                self._line_up(key)
            else:
                del self.queues[key]
            return ticket
        return None

    def remove(self, ticket: Ticket) -> None:
        queue = self.queues[ticket.key]
        queue.remove(ticket)
        if not queue:
            # Its place in the heap stays, and is passed over or taken by its next request.
            del self.queues[ticket.key]

    def ahead_of(self, key: str) -> int:
        """Requests that would be served before one more of `key`."""
        own = len(self.queues.get(key, ()))
        return own + sum(
            min(len(queue), own + 1) for each, queue in self.queues.items() if each != key
        )

    def _line_up(self, key: str) -> None:
        if not any(each == key for _, _, each in self.starts):
            start = max(self.clock, self.ends.get(key, 0.0))
            heapq.heappush(self.starts, (start, next(self.order), key))


class Admission:
    """See the module. A request is in the queue, or running, or unknown."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._classes = {priority: _Class() for priority in Priority}
        self._queued: dict[str, Ticket] = {}
        self._running: set[str] = set()
        self._mean_duration_s = FIRST_DURATION_S

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queued)

    @property
    def running(self) -> int:
        """Requests admitted and not over."""
        return len(self._running)

    @property
    def open(self) -> bool:
        """True if one more request would be taken in, whoever sent it."""
        limits = self._limits
        return self.running + self.queued < limits.max_running + limits.max_queued

    def offer(self, ticket: Ticket, now: float, backlog_s: float) -> Ticket | None:
        """Take a request into the queue, from which `next` lets it out, perhaps at once.

        Args:
            ticket: the request.
            now: monotonic seconds, the clock of the deadline.
            backlog_s: work that the least busy worker has.

        Returns:
            A request that has to leave the full queue for it, if there is one.

        Raises:
            OverloadedError: the queue is full of others with as much right to be there, or the
                request would not be served by its deadline.
        """
        wait_s = self.predicted_wait_s(ticket.priority, ticket.key, backlog_s)
        if now + wait_s >= ticket.deadline:
            raise self._overloaded(
                f"The request would wait {wait_s:.1f} s, longer than it has left.", wait_s
            )
        victim = None
        if not self.open:
            victim = self._victim_for(ticket)
            if victim is None:
                raise self._overloaded(
                    f"The router has {self.running} requests running and {self.queued} waiting, "
                    "as many as it takes.",
                    wait_s,
                )
            self._classes[victim.priority].remove(victim)
            del self._queued[victim.request_id]
        self._queued[ticket.request_id] = ticket
        self._classes[ticket.priority].push(ticket)
        return victim

    def next(self, backlog_s: float) -> Ticket | None:
        """Let out the request whose turn it is, if it may run now; it counts as running then."""
        limits = self._limits
        if self.running >= limits.max_running or backlog_s > limits.max_backlog_s:
            return None
        for each in self._classes.values():
            ticket = each.pop()
            if ticket is not None:
                del self._queued[ticket.request_id]
                self._running.add(ticket.request_id)
                return ticket
        return None

    def leave(self, request_id: str, duration_s: float) -> None:
        """A request is over, or its client gave up; harmless if it is unknown.

        Args:
            request_id: of the request.
            duration_s: how long it ran; of no account if it still waited.
        """
        ticket = self._queued.pop(request_id, None)
        if ticket is not None:
            self._classes[ticket.priority].remove(ticket)
        elif request_id in self._running:
            self._running.remove(request_id)
            self._mean_duration_s += DURATION_WEIGHT * (duration_s - self._mean_duration_s)

    def predicted_wait_s(self, priority: Priority, key: str, backlog_s: float) -> float:
        """Seconds until the prompt of a new request of this class and key would begin.

        By Little's law the requests that run end at one per mean duration and place.
        """
        before = [queue for each, queue in self._classes.items() if each < priority]
        ahead = sum(map(len, before)) + self._classes[priority].ahead_of(key)
        over = self.running + ahead + 1 - self._limits.max_running
        return backlog_s + max(0, over) * self._mean_duration_s / self._limits.max_running

    def _victim_for(self, ticket: Ticket) -> Ticket | None:
        """The newest request of who waits with most, in the last class that is waiting."""
        for priority in reversed(Priority):
            queues = self._classes[priority].queues
            if not queues:
                continue
            if priority < ticket.priority:
                return None
            queue = max(queues.values(), key=len)
            own = len(queues.get(ticket.key, ()))
            fair = priority == ticket.priority and len(queue) > own + 1
            return queue[-1] if priority > ticket.priority or fair else None
        return None

    def _overloaded(self, message: str, wait_s: float) -> OverloadedError:
        least, most = RETRY_AFTER_S
        after_s = min(most, max(least, wait_s))
        return OverloadedError(f"{message} Try again in {after_s:.0f} s.", retry_after_s=after_s)


def pushed_out() -> OverloadedError:
    """What a request is told that had to leave a full queue."""
    return OverloadedError(
        "The queue is full, and a request with more right to be in it took this one's place. "
        "Try again later.",
        retry_after_s=RETRY_AFTER_S[0],
    )


def check_fits(request: GenerationRequest, model: ServedModel) -> None:
    """Refuse what the model's context can't hold.

    Raises:
        InvalidRequestError: no prompt, or prompt and max_tokens exceed the context; the message
            says all lengths.
    """
    prompt_len, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
    limit = model.max_model_len
    if prompt_len == 0:
        raise InvalidRequestError("The prompt holds no tokens.", param="prompt")
    if prompt_len + max_tokens > limit:
        raise InvalidRequestError(
            f"The prompt has {prompt_len} tokens and max_tokens is {max_tokens}, together "
            f"{prompt_len + max_tokens}; the model's context holds {limit}. Shorten the prompt or "
            "lower max_tokens.",
            param="prompt" if prompt_len >= limit else "max_tokens",
            code=ErrorCode.CONTEXT_LENGTH,
        )
