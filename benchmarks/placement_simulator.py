"""Replays a trace against the router's own placement code and other policies, in virtual time.

    python -m benchmarks.placement_simulator --trace mooncake_conversation_trace.jsonl --save

Workers are modelled (diptych/planning/workers.py), placement is not: the router's policy is the
placer with its index and prices as they run in production, behind its admission queue. A fleet has
3 prefill workers for each decode worker. Larger fleets get several windows of the trace at once,
which share no blocks.

Hit rates are parts of the bound: what one infinite cache would spare, which holds every prompt when
the next one arrives.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.modelled_hardware import llama_70b_on_eight_h200
from benchmarks.placement_policies import (
    ApproximatePrefix,
    LeastLoaded,
    Ours,
    Policy,
    RoundRobin,
)
from benchmarks.report import Report
from diptych.planning.block_cache import BlockCache, hit_rate_of_one_cache
from diptych.planning.rates import WorkerRates
from diptych.planning.trace import (
    TracedRequest,
    overlay,
    read_trace,
)
from diptych.planning.workers import REPORT_S, DecodeWorker, Events, Job, PrefillWorker

SLO_TTFT_S, SLO_TPOT_S = 2.0, 0.025
"""What a request must meet to count as good. Source: those of Dynamo's published runs."""
POLICIES = ("ours", "approximate prefix", "least loaded", "round robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """How many workers of each kind, and how much traffic they get."""

    prefill: int
    decode: int
    copies: int
    window_s: float

    @property
    def size(self) -> int:
        """Workers."""
        return self.prefill + self.decode


FLEETS = (
    Fleet(prefill=6, decode=2, copies=1, window_s=3600.0),
    Fleet(prefill=48, decode=16, copies=8, window_s=900.0),
    Fleet(prefill=384, decode=128, copies=64, window_s=240.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a policy did."""

    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    good: float
    """Part of the requests that met the SLO."""
    goodput: float
    """Those, per second."""
    decision_s: float
    """Mean time that a choice took, in real seconds."""


def make_policy(name: str, fleet: Fleet, rates: WorkerRates, cache_blocks: int) -> Policy:
    """A policy over the workers of a fleet."""
    prefill, decode = names(fleet)
    match name:
        case "ours":
            return Ours(prefill, decode, rates)
        case "approximate prefix":
            return ApproximatePrefix(prefill, decode, blocks=cache_blocks)
        case "least loaded":
            return LeastLoaded(prefill, decode)
        case _:
            return RoundRobin(prefill, decode)


def names(fleet: Fleet) -> tuple[list[str], list[str]]:
    """Names of the prefill and of the decode workers."""
    return [f"p{i}" for i in range(fleet.prefill)], [f"d{i}" for i in range(fleet.decode)]


def simulate(
    requests: Sequence[TracedRequest],
    policy: Policy,
    fleet: Fleet,
    rates: WorkerRates,
    cache_blocks: int,
) -> list[Job]:
    """Run all requests to their end."""
    events = Events()
    listener = policy if isinstance(policy, Ours) else None
    tell = listener.cache if listener is not None else None
    prefill, decode = (
        {
            name: kind(
                events=events,
                rates=rates,
                name=name,
                cache=BlockCache(cache_blocks),
                tell=tell,
            )
            for name in pool
        }
        for kind, pool in zip((PrefillWorker, DecodeWorker), names(fleet), strict=True)
    )
    jobs = [Job(request=request) for request in requests]
    open_jobs = len(jobs)

    def ended(job: Job) -> None:
        nonlocal open_jobs
        open_jobs -= 1
        policy.ended(job, events.now)
        start_next()

    def computed(job: Job) -> None:
        policy.first_token(job, events.now)
        decode[job.decode].submit(job, ended)

    def arrive(job: Job) -> None:
        policy.arrived(job, events.now)
        start_next()

    def start_next() -> None:
        while (job := policy.next(events.now)) is not None:
            job.prefill, job.decode = policy.place(job, events.now)
            prefill[job.prefill].submit(job, computed)

    for job in jobs:
        events.at(job.request.arrives_at, partial(arrive, job))

    def report(name: str, worker: PrefillWorker | DecodeWorker) -> None:
        assert listener is not None
        listener.report(name, worker.load(), events.now)
        start_next()
        if open_jobs:
            events.at(events.now + REPORT_S, partial(report, name, worker))

    if listener is not None:
        workers = [*prefill.items(), *decode.items()]
        for index, (name, worker) in enumerate(workers):
            events.at(REPORT_S * index / len(workers), partial(report, name, worker))
    events.run()
    return jobs


def judge(jobs: Sequence[Job], real_s: float) -> Outcome:
    """Sum up a run."""
    ttft = np.array([job.ttft_s for job in jobs])
    good = sum(job.ttft_s <= SLO_TTFT_S and job.tpot_s <= SLO_TPOT_S for job in jobs)
    span = max(job.request.arrives_at for job in jobs)
    return Outcome(
        hit_rate=sum(job.cached_tokens for job in jobs)
        / sum(job.request.prompt_tokens for job in jobs),
        ttft_p50_s=float(np.percentile(ttft, 50)),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        good=good / len(jobs),
        goodput=good / span,
        decision_s=real_s / len(jobs),
    )


def main() -> None:
    """Simulate every policy on every fleet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--speed", type=float, default=4.0, help="seconds of trace in one second")
    parser.add_argument(
        "--cache-blocks", type=int, default=10_000, help="of 512 tokens, per worker"
    )
    parser.add_argument("--fleets", type=int, nargs="*", default=[8, 64, 512])
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    trace = read_trace(arguments.trace)
    rates = llama_70b_on_eight_h200()
    settings = {**vars(arguments), "trace": arguments.trace.name}
    report = Report("placement-simulator", settings)
    for fleet in FLEETS:
        if fleet.size not in arguments.fleets:
            continue
        requests = overlay(
            trace, copies=fleet.copies, window_s=fleet.window_s, speed=arguments.speed
        )
        blocks = arguments.cache_blocks
        bound = hit_rate_of_one_cache(requests, None)
        pooled = hit_rate_of_one_cache(requests, fleet.prefill * blocks)
        where = f"{fleet.size} workers"
        report.add(f"{where}: requests", len(requests), "")
        report.add(f"{where}: hit rate of one infinite cache (bound)", bound, "")
        report.add(f"{where}: one cache as large as all / bound", pooled / bound, "x")
        for name in arguments.policies:
            policy = make_policy(name, fleet, rates, blocks)
            began = time.process_time()
            jobs = simulate(requests, policy, fleet, rates, blocks)
            outcome = judge(jobs, time.process_time() - began)
            add(report, f"{where}, {name}", outcome, bound)
    if arguments.save:
        print(report.save())


def add(report: Report, label: str, outcome: Outcome, bound: float) -> None:
    """One policy's figures."""
    report.add(f"{label}: hit rate / bound", outcome.hit_rate / bound, "x")
    report.add(f"{label}: TTFT p50", outcome.ttft_p50_s, "s")
    report.add(f"{label}: TTFT p99", outcome.ttft_p99_s, "s")
    report.add(f"{label}: requests within the SLO", outcome.good, "x")
    report.add(f"{label}: goodput", outcome.goodput, "req/s")


if __name__ == "__main__":
    main()
