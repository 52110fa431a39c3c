"""A modelled fleet whose pools grow and shrink in virtual time, under the controller's own policy.

What is modelled: replicas that take a while to start, that finish what they have before they go,
and cost from the moment they are asked for until they are gone; what routers would expose of them.
Signals, rates and decisions are those of diptych/autoscale; workers are those of the planner.
"""

import itertools
import math
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from diptych.autoscale.policy import PoolScaler
from diptych.autoscale.signals import Reading, Signals, SignalWindow
from diptych.planning.block_cache import BlockCache
from diptych.planning.fleet import Slo, is_good
from diptych.planning.rates import WorkerRates
from diptych.planning.trace import BLOCK_SIZE, TracedRequest, made_up
from diptych.planning.workers import DecodeWorker, Events, Job, PrefillWorker
from telemetry.metrics import ITL_BUCKETS_S

ROUTER = "router"


@dataclass(slots=True, eq=False)
class Replica:
    """One replica of a pool."""

    worker: PrefillWorker | DecodeWorker
    asked_at: float
    ready_at: float
    draining: bool = False
    gone_at: float = math.inf
    requests: int = 0
    tokens: int = 0
    """KV that its requests will hold, those on their way to it included."""


@dataclass(slots=True, kw_only=True)
class ElasticFleet:
    """See the module."""

    events: Events
    rates: WorkerRates
    start_s: float
    pools: dict[str, list[Replica]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    gone: list[tuple[str, Replica]] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    sizes: dict[str, list[tuple[float, int]]] = field(
        default_factory=lambda: {"prefill": [], "decode": []}
    )
    """Role to every size that was asked for, and when."""
    arrived_tokens: int = 0
    gaps: list[float] = field(default_factory=lambda: [0.0] * (len(ITL_BUCKETS_S) + 1))
    sampled_at: float = 0.0

    def scale(self, role: str, replicas: int, *, at_once: bool = False) -> None:
        """Ask for a size; those that are not ready go first, then the newest."""
        now, pool = self.events.now, self.pools[role]
        self.sizes[role].append((now, replicas))
        staying = [each for each in pool if not each.draining]
        for _ in range(replicas - len(staying)):
            kind = PrefillWorker if role == "prefill" else DecodeWorker
            worker = kind(
                events=self.events, rates=self.rates, name="", cache=BlockCache(0), tell=None
            )
            ready_at = now + (0.0 if at_once else self.start_s)
            pool.append(Replica(worker, asked_at=now, ready_at=ready_at))
        for each in sorted(staying, key=lambda each: each.ready_at)[replicas:]:
            each.draining = True
            self._leave(role, each)

    def size(self, role: str) -> int:
        """Replicas that were asked for."""
        return self.sizes[role][-1][1]

    def submit(self, request: TracedRequest) -> None:
        """A request arrives."""
        job = Job(request=request)
        self.jobs.append(job)
        self.arrived_tokens += request.prompt_tokens
        best = min(self.ready("prefill"), key=self._backlog_s)
        best.requests += 1

        def computed(job: Job) -> None:
            best.requests -= 1
            self._leave("prefill", best)
            self._decode(job)

        assert isinstance(best.worker, PrefillWorker)
        best.worker.submit(job, computed)

    def _decode(self, job: Job) -> None:
        best = min(self.ready("decode"), key=lambda each: each.tokens)
        held = job.request.prompt_tokens + job.request.output_tokens
        best.requests += 1
        best.tokens += held

        def ended(job: Job) -> None:
            best.requests -= 1
            best.tokens -= job.request.prompt_tokens + job.request.output_tokens
            self._leave("decode", best)

        assert isinstance(best.worker, DecodeWorker)
        best.worker.submit(job, ended)

    def _leave(self, role: str, replica: Replica) -> None:
        if replica.draining and not replica.requests and replica in self.pools[role]:
            replica.gone_at = self.events.now
            self.pools[role].remove(replica)
            self.gone.append((role, replica))

    def _backlog_s(self, replica: Replica) -> float:
        worker = replica.worker
        load = worker.load()
        return load.backlog_tokens / (load.prefill_tokens_per_s or self._usual_rate)

    @property
    def _usual_rate(self) -> float:
        return 1 / self.rates.prefill_s_per_token

    def ready(self, role: str) -> list[Replica]:
        """Replicas that take requests."""
        return [
            each
            for each in self.pools[role]
            if each.ready_at <= self.events.now and not each.draining
        ]

    def reading(self) -> Reading:
        """What a router would expose now."""
        now = self.events.now
        prefill, decode = self.ready("prefill"), self.ready("decode")
        loads = [each.worker.load() for each in decode]
        for load in loads:
            index = bisect_left(ITL_BUCKETS_S, load.decode_step_s)
            self.gaps[index] += load.running * (now - self.sampled_at) / load.decode_step_s
        self.sampled_at = now
        total, gaps = 0.0, {}
        for bound, count in zip((*ITL_BUCKETS_S, math.inf), self.gaps, strict=True):
            total += count
            gaps[bound] = total
        rates = [each.worker.load().prefill_tokens_per_s for each in prefill]
        known = [rate for rate in rates if rate]
        blocks = self.rates.kv_tokens // BLOCK_SIZE
        return Reading(
            at=now,
            ready={"prefill": len(prefill), "decode": len(decode)},
            backlog_s=sum(map(self._backlog_s, prefill)) / max(1, len(prefill)),
            kv=sum(load.held_blocks for load in loads) / (blocks * max(1, len(loads))),
            batch=sum(load.running + load.waiting for load in loads)
            / (self.rates.max_num_seqs * max(1, len(loads))),
            prompt_tokens=float(self.arrived_tokens),
            gaps=gaps,
            hit_ratio=0.0,
            prefill_tokens_per_s=sum(known) / len(known) if known else 0.0,
        )

    def replica_s(self, role: str, until: float) -> float:
        """Seconds that replicas were paid for."""
        gone = [each for pool, each in self.gone if pool == role]
        return sum(min(each.gone_at, until) - each.asked_at for each in gone + self.pools[role])


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What came of a load on a fleet that the policy scales."""

    good: float
    """Share of the requests within the SLO."""
    late: Sequence[TracedRequest]
    """The others."""
    replica_hours: Mapping[str, float]
    sizes: Mapping[str, Sequence[tuple[float, int]]]

    def peak(self, role: str) -> int:
        """Most replicas."""
        return max(size for _, size in self.sizes[role])

    def turns(self, role: str) -> int:
        """Times that a pool that grew shrank, or the other way round."""
        sizes = [size for _, size in self.sizes[role]]
        ways = [b > a for a, b in itertools.pairwise(sizes) if a != b]
        return sum(a != b for a, b in itertools.pairwise(ways))


def replay(
    requests: Sequence[TracedRequest],
    fleet: ElasticFleet,
    scalers: Mapping[str, PoolScaler],
    window: SignalWindow,
    slo: Slo,
    *,
    interval_s: float,
) -> Replay:
    """Play a load on a fleet that has its first replicas, deciding every `interval_s`."""
    events, span_s = fleet.events, requests[-1].arrives_at
    for request in requests:
        events.at(request.arrives_at, partial(fleet.submit, request))

    def turn() -> None:
        window.add({ROUTER: fleet.reading()})
        signals: Signals = window.signals(complete=True)
        for role, scaler in scalers.items():
            decision = scaler.decide(getattr(signals, role), fleet.size(role), events.now)
            if decision.replicas != fleet.size(role):
                fleet.scale(role, decision.replicas)
        if events.now + interval_s < span_s:
            events.at(events.now + interval_s, turn)

    events.at(interval_s, turn)
    events.run()
    assert all(job.ended_at for job in fleet.jobs), "a request was lost"
    late = [job.request for job in fleet.jobs if not is_good(job, slo)]
    return Replay(
        good=1 - len(late) / len(fleet.jobs),
        late=late,
        replica_hours={role: fleet.replica_s(role, span_s) / 3600 for role in fleet.pools},
        sizes=fleet.sizes,
    )


def varying(
    rate: Callable[[float], float], *, peak: float, span_s: float, seed: int = 0
) -> Iterator[float]:
    """Times of arrivals at a rate that varies, by thinning a steady stream at its peak.

    Source: Lewis and Shedler, Simulation of nonhomogeneous Poisson processes by thinning, 1979.
    """
    chance, at = random.Random(seed), 0.0
    while (at := at + chance.expovariate(peak)) < span_s:
        if chance.random() * peak < rate(at):
            yield at


def load_of(
    rate: Callable[[float], float],
    *,
    peak: float,
    span_s: float,
    prompt_tokens: float,
    output_tokens: float,
    seed: int = 0,
) -> list[TracedRequest]:
    """Requests at a varying rate; lengths vary by half their mean."""
    times = list(varying(rate, peak=peak, span_s=span_s, seed=seed))
    lengths = made_up(
        rate=1, prompt_tokens=prompt_tokens, output_tokens=output_tokens, spread=0.5,
        count=len(times), seed=seed,
    )  # fmt: skip
    return [
        TracedRequest(
            arrives_at=at, prompt_tokens=each.prompt_tokens, output_tokens=each.output_tokens
        )
        for at, each in zip(times, lengths, strict=True)
    ]
