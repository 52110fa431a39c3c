"""What becomes of a load on a fleet of some size, in virtual time. Pure.

Prompts go, in the order of their arrival, to the prefill replica that is free first, which is what
the router's placement comes to when replicas are alike; what a cache spares of each is given. Their
KV then moves to the decode replica that holds least, and decode is the modelled worker that the
placement simulator uses too.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from diptych.planning.block_cache import BlockCache
from diptych.planning.rates import WorkerRates
from diptych.planning.trace import TracedRequest
from diptych.planning.workers import DecodeWorker, Events, Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request must meet to count as good, and how many of them must."""

    ttft_s: float
    tpot_s: float
    """Mean time per output token after the first."""
    share: float

    def allowed_misses(self, count: int) -> int:
        """Requests of so many that may miss it."""
        # Shares such as 0.9 are not exact in binary: 10 requests would allow none otherwise.
        return int(count * (1 - self.share) + 1e-9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """What became of the prompts on a prefill pool."""

    jobs: Sequence[Job]
    """With `cached_tokens` and `first_token_at`; not to be changed."""
    busy_s: float
    """Time that all replicas together computed."""
    late: int
    """Requests that missed the TTFT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a load on a fleet."""

    good: float
    """Share of the requests that met the SLO."""
    late_ttft: float
    """Share that missed the TTFT."""
    late_tpot: float
    ttft_s: float
    """TTFT that the SLO's share of the requests had at most."""
    tpot_s: float
    prefill_busy: float
    """Share of the time that prefill replicas computed."""
    decode_kv: float
    """Mean share of the KV that decode replicas hold."""
    decode_batch: float
    """Mean share of the places in their batches that were taken."""


def prefill(
    requests: Sequence[TracedRequest],
    cached: Sequence[int],
    replicas: int,
    rates: WorkerRates,
    slo: Slo,
) -> Prefilled:
    """Compute all prompts on a pool.

    Args:
        requests: in the order of their arrival.
        cached: tokens of each prompt that need not be computed.
        replicas: of the pool.
        rates: of each of them.
        slo: what counts as late.
    """
    free_at = [0.0] * replicas
    jobs, busy_s, late = [], 0.0, 0
    for request, spared in zip(requests, cached, strict=True):
        seconds = rates.prefill_s(request.prompt_tokens - spared, spared)
        done_at = max(request.arrives_at, free_at[0]) + seconds
        heapq.heapreplace(free_at, done_at)
        busy_s += seconds
        job = Job(request=request, cached_tokens=spared, first_token_at=done_at)
        late += job.ttft_s > slo.ttft_s
        jobs.append(job)
    return Prefilled(jobs=jobs, busy_s=busy_s, late=late)


def decode(
    prefilled: Prefilled, replicas: int, rates: WorkerRates, slo: Slo, *, max_misses: int | None
) -> list[Job] | None:
    """Generate all outputs on a pool.

    Args:
        prefilled: what the prefill pool left.
        replicas: of the decode pool.
        rates: of each of them.
        slo: what counts as missed.
        max_misses: requests that may miss the SLO; None: any number.

    Returns:
        The requests with their ends; None as soon as more than `max_misses` have missed the SLO.
    """
    events, misses = Events(), 0
    pool = [
        DecodeWorker(events=events, rates=rates, name="", cache=BlockCache(0), tell=None)
        for _ in range(replicas)
    ]
    promised = [0] * replicas

    def submit(job: Job) -> None:
        index = promised.index(min(promised))
        promised[index] += tokens_of(job)

        def ended(job: Job) -> None:
            nonlocal misses
            promised[index] -= tokens_of(job)
            misses += not is_good(job, slo)
            if max_misses is not None and misses > max_misses:
                events.stop()

        pool[index].submit(job, ended)

    jobs = [replace(job) for job in prefilled.jobs]
    for job in jobs:
        events.at(job.first_token_at, partial(submit, job))
    events.run()
    return None if max_misses is not None and misses > max_misses else jobs


def tokens_of(job: Job) -> int:
    """KV that it holds by its end."""
    return job.request.prompt_tokens + job.request.output_tokens


def is_good(job: Job, slo: Slo) -> bool:
    """True if it met the SLO."""
    return job.ttft_s <= slo.ttft_s and job.tpot_s <= slo.tpot_s


def judge(
    jobs: Sequence[Job], busy_s: float, slo: Slo, rates: WorkerRates, *, replicas: tuple[int, int]
) -> Outcome:
    """Sum up a run on (prefill, decode) replicas."""
    ttft, tpot = np.array([[job.ttft_s, job.tpot_s] for job in jobs]).T
    first = jobs[0].request.arrives_at
    span_s = max(job.ended_at for job in jobs) - first
    seconds = np.array([job.ended_at - job.first_token_at for job in jobs])
    held = seconds @ np.array([float(tokens_of(job)) for job in jobs])
    decode_s = span_s * replicas[1]
    return Outcome(
        good=float(np.mean((ttft <= slo.ttft_s) & (tpot <= slo.tpot_s))),
        late_ttft=float(np.mean(ttft > slo.ttft_s)),
        late_tpot=float(np.mean(tpot > slo.tpot_s)),
        ttft_s=float(np.quantile(ttft, slo.share)),
        tpot_s=float(np.quantile(tpot, slo.share)),
        prefill_busy=busy_s / (span_s * replicas[0]),
        decode_kv=float(held) / (decode_s * rates.kv_tokens),
        decode_batch=float(seconds.sum()) / (decode_s * rates.max_num_seqs),
    )
