"""Modelled workers in virtual time, for the planner and benchmarks: no sleeping, no I/O.

What is modelled: prompts computed one after the other at the rate of the model's arithmetic, prefix
caches with LRU eviction, KV moved over a link, decode batches whose step takes longer the more they
hold, load reports and cache events that arrive late. What is not: chunked prefill of several
prompts at a time, layer-wise transfer, preemption, failures, cost of reading a host tier.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from diptych.planning.block_cache import BlockCache
from diptych.planning.rates import WorkerRates
from diptych.planning.trace import BLOCK_SIZE, TracedRequest
from router.fleet.worker import CacheChange, WorkerLoad

REPORT_S = 0.25
"""Between two load reports, as the workers' default."""
DELAY_S = 0.003
"""Until a report or an event is with the router."""


@dataclass(slots=True, eq=False)
class Job:
    """A request under way."""

    request: TracedRequest
    prefill: str = ""
    decode: str = ""
    cached_tokens: int = 0
    expected_new: int = 0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    ends_at_step: float = 0.0

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_token_at - self.request.arrives_at

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first."""
        return (self.ended_at - self.first_token_at) / max(1, self.request.output_tokens - 1)


class Events:
    """What happens next, in virtual time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._stopped = False

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Have something called then."""
        heapq.heappush(self._queue, (when, next(self._order), call))

    def stop(self) -> None:
        """Let nothing more happen: what there is to know is known."""
        self._stopped = True

    def run(self) -> None:
        """Go on until nothing is left."""
        while self._queue and not self._stopped:
            self.now, _, call = heapq.heappop(self._queue)
            call()


@dataclass(slots=True)
class _Worker:
    events: Events
    rates: WorkerRates
    name: str
    cache: BlockCache
    tell: Callable[[str, CacheChange], None] | None
    """Where cache events go, if anybody listens."""
    seq: int = 0

    def _store(self, job: Job) -> None:
        stored, removed = self.cache.store(job.request.hashes)
        tell = self.tell
        if tell is not None and (stored or removed):
            self.seq += 1
            change = CacheChange(epoch=1, seq=self.seq, reset=False, stored=stored, removed=removed)
            self.events.at(self.events.now + DELAY_S, lambda: tell(self.name, change))


@dataclass(slots=True)
class PrefillWorker(_Worker):
    """Computes prompts in the order of their arrival."""

    queue: deque[Job] = field(default_factory=deque)
    rate: float = 0.0
    waiting_tokens: int = 0
    ends_at: float = 0.0

    def submit(self, job: Job, done: Callable[[Job], None]) -> None:
        """Take a prompt; `done` is called when its first token is there."""
        cached = min(self.cache.match(job.request.hashes) * BLOCK_SIZE, job.request.prompt_tokens)
        job.expected_new = job.request.prompt_tokens - cached
        self.waiting_tokens += job.expected_new
        self.queue.append(job)
        if len(self.queue) == 1:
            self._start(done)

    def load(self) -> WorkerLoad:
        """Its load report."""
        left = 0
        if self.queue:
            left = int(max(0.0, self.ends_at - self.events.now) * self.rate)
        return WorkerLoad(
            waiting=max(0, len(self.queue) - 1),
            running=min(1, len(self.queue)),
            backlog_tokens=self.waiting_tokens + left,
            prefill_tokens_per_s=self.rate,
        )

    def _start(self, done: Callable[[Job], None]) -> None:
        job = self.queue[0]
        request = job.request
        self.waiting_tokens -= job.expected_new
        matched = self.cache.match(request.hashes) * BLOCK_SIZE
        job.cached_tokens = min(matched, request.prompt_tokens - 1)
        new = request.prompt_tokens - job.cached_tokens
        seconds = self.rates.prefill_s(new, job.cached_tokens)
        self.rate += (new / seconds - self.rate) * (0.2 if self.rate else 1.0)
        self.ends_at = self.events.now + seconds
        self.events.at(self.ends_at, lambda: self._finish(done))

    def _finish(self, done: Callable[[Job], None]) -> None:
        job = self.queue.popleft()
        self._store(job)
        job.first_token_at = self.events.now
        if self.queue:
            self._start(done)
        done(job)


@dataclass(slots=True)
class DecodeWorker(_Worker):
    """A batch in which every sequence gets one token per step."""

    waiting: deque[Job] = field(default_factory=deque)
    running: list[tuple[float, int, Job]] = field(default_factory=list)
    """Heap by the step at which each ends."""
    held_tokens: int = 0
    steps: float = 0.0
    seen_at: float = 0.0
    version: int = 0
    order: int = 0

    def submit(self, job: Job, done: Callable[[Job], None]) -> None:
        """Take a prompt that is computed: move its KV, then generate."""
        matched = self.cache.match(job.request.hashes) * BLOCK_SIZE
        moved = max(0, job.request.prompt_tokens - matched)
        arrives_at = self.events.now + self.rates.transfer_s(moved)
        self.events.at(arrives_at, lambda: self._adopt(job, done))

    def load(self) -> WorkerLoad:
        """Its load report."""
        return WorkerLoad(
            waiting=len(self.waiting),
            running=len(self.running),
            held_blocks=self.held_tokens // BLOCK_SIZE,
            decode_step_s=self._step_s(),
        )

    def _adopt(self, job: Job, done: Callable[[Job], None]) -> None:
        self._store(job)
        self.waiting.append(job)
        self._go_on(done)

    def _go_on(self, done: Callable[[Job], None]) -> None:
        now = self.events.now
        if self.running:
            self.steps += (now - self.seen_at) / self._step_s()
        self.seen_at = now
        while self.running and self.running[0][0] <= self.steps + 1e-6:
            job = heapq.heappop(self.running)[2]
            self.held_tokens -= _held(job)
            job.ended_at = now
            done(job)
        while self.waiting and self._has_room(self.waiting[0]):
            job = self.waiting.popleft()
            self.held_tokens += _held(job)
            self.order += 1
            ends_at = self.steps + max(0, job.request.output_tokens - 1)
            heapq.heappush(self.running, (ends_at, self.order, job))
        self.version += 1
        if self.running:
            version = self.version
            left = max(0.0, self.running[0][0] - self.steps) * self._step_s()

            def turn() -> None:
                if version == self.version:
                    self._go_on(done)

            self.events.at(now + left, turn)

    def _step_s(self) -> float:
        return self.rates.decode_step_s(len(self.running), self.held_tokens)

    def _has_room(self, job: Job) -> bool:
        if not self.running:
            return True
        room = self.held_tokens + _held(job) <= self.rates.kv_tokens
        return room and len(self.running) < self.rates.max_num_seqs


def _held(job: Job) -> int:
    return job.request.prompt_tokens + job.request.output_tokens
