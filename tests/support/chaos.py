"""A whole system under blows: real processes, requests of every kind, and a verdict at the end.

Used by tests/e2e/test_chaos.py and, for hours, by benchmarks/chaos.py. Requests and blows follow
from a seed; every answer must equal the one that the same processes gave while they were left in
peace, and at the end nothing may be held anywhere.
"""

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx

from tests.support.chaos_plan import STEP_DELAY, ChaosPlan, ChaosReport
from tests.support.chaos_requests import (
    TEMPLATE,
    Answer,
    ChaosRequest,
    answer_within,
    difference,
    make_requests,
)
from tests.support.chaos_schedule import Blow
from tests.support.chaos_ties import MOST_TIES, is_near_tie
from tests.support.cluster import START_S, Cluster, Worker, make_worker, routed
from tests.support.models import make_checkpoint
from tests.support.process import frozen, http_status, wait_until
from tests.support.proxy import Proxy, proxy

LIMIT_S = 130.0
"""Longest that a request may take by the client's clock: the router's own limit and some."""
BALANCE_S = 40.0


@contextmanager
def chaos_cluster(model: Path, plan: ChaosPlan) -> Iterator[tuple[Cluster, list[Proxy]]]:
    """The system, with a proxy between the router and each worker."""
    with ExitStack() as stack:
        pools = {
            role: [
                make_worker(
                    role,
                    model,
                    plan.transport,
                    {**plan.worker_settings, **own, "worker_id": f"{role}{i}"},
                )
                for i in range(count)
            ]
            for role, count, own in (
                ("prefill", plan.prefill, {"lease_ttl_s": "4s"}),
                ("decode", plan.decode, {"peer_silence_s": "2s", "probe_interval_s": "5s"}),
            )
        }
        proxies: dict[int, Proxy] = {}
        for worker in (*pools["prefill"], *pools["decode"]):
            stack.callback(worker.stack.close)
            worker.start()
            between = proxy(("127.0.0.1", 0), ("127.0.0.1", worker.port))
            proxies[worker.port] = stack.enter_context(between)

        def through(worker: Worker) -> str:
            host, port = proxies[worker.port].address
            return f"{host}:{port}"

        system = stack.enter_context(
            routed(model, **pools, router=plan.router_settings, through=through)
        )
        yield system, list(proxies.values())


async def undisturbed(system: Cluster, requests: Sequence[ChaosRequest]) -> dict[int, Answer]:
    """What the system answers while it is left in peace."""
    turn = asyncio.Semaphore(96)
    async with httpx.AsyncClient(base_url=system.url, timeout=LIMIT_S, trust_env=False) as client:

        async def one(request: ChaosRequest) -> Answer:
            async with turn:
                return await answer_within(client, request, LIMIT_S, stay=True)

        answers = await asyncio.gather(*map(one, requests))
    return {request.number: each for request, each in zip(requests, answers, strict=True)}


async def under_blows(
    system: Cluster,
    proxies: Sequence[Proxy],
    model: Path,
    plan: ChaosPlan,
    requests: Sequence[ChaosRequest],
    report: ChaosReport,
    expected: Mapping[int, Answer],
) -> None:
    """Send every request at its time while the schedule is carried out; undo all blows."""
    source = random.Random(f"arrivals/{plan.seed}")
    arrivals = sorted(source.uniform(0, plan.duration_s) for _ in requests)
    began = time.monotonic()

    async def until(at_s: float) -> None:
        await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))

    async def ask(client: httpx.AsyncClient, request: ChaosRequest, at_s: float) -> None:
        await until(at_s)
        answer = await answer_within(client, request, LIMIT_S)
        report.answers[request.kind] += 1
        wrong = difference(expected[request.number], answer)
        if wrong and answer.status == 200 and await asyncio.to_thread(is_near_tie, model, request):
            report.near_ties.append(request.number)
        elif wrong:
            report.failures.append(f"{_name(request)}: {wrong}")

    hurt: set[int] = set()

    async def strike(blow: Blow) -> None:
        await until(blow.at_s)
        prefills = range(plan.prefill)
        role = prefills if blow.worker in prefills else range(plan.prefill, len(proxies))
        if blow.worker in hurt or len(hurt.intersection(role)) >= len(role) - 1:
            report.left_out.append(blow)
            return
        hurt.add(blow.worker)
        report.log += await _strike(system.workers[blow.worker], proxies[blow.worker], blow)
        hurt.discard(blow.worker)

    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(
            base_url=system.url, timeout=LIMIT_S, trust_env=False, limits=limits
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        for blow in plan.schedule:
            group.create_task(strike(blow))
        for request, at_s in zip(requests, arrivals, strict=True):
            group.create_task(ask(client, request, at_s))


async def _strike(worker: Worker, between: Proxy, blow: Blow) -> str:
    """Carry it out and undo it; returns the log of a worker that was ended."""
    log = ""
    match blow.kind:
        case "kill" | "drain":
            log = await asyncio.to_thread(_end, worker, blow)
            await asyncio.sleep(blow.for_s)
            faults = f"{STEP_DELAY};{blow.faults};seed={int(blow.at_s * 100)}"
            worker.start("--faults", faults)
            await asyncio.to_thread(wait_until, partial(_answers, worker), START_S, "its return")
        case "freeze" | "hang":
            with ExitStack() as stack:
                for pid in worker.pids[blow.kind == "hang" :]:
                    stack.enter_context(frozen(pid))
                await asyncio.sleep(blow.for_s)
        case "slow":
            between.delay_s = blow.for_s / 10
            await asyncio.sleep(blow.for_s)
            between.delay_s = 0.0
        case "dark" | "refuse":
            (between.black_hole if blow.kind == "dark" else between.refuse)()
            await asyncio.sleep(blow.for_s)
            between.mend()
    return log


def _answers(worker: Worker) -> bool:
    return http_status(f"http://127.0.0.1:{worker.metrics_port}/readyz") == 200


def _end(worker: Worker, blow: Blow) -> str:
    process = worker.process
    assert process is not None
    if blow.kind == "drain":
        process.signal(signal.SIGTERM)
        process.wait(20)
    worker.kill()
    return f"== {process.name}, {blow}\n{process.log}\n"


def make_model(folder: Path) -> Path:
    """A small random one whose chat template knows functions."""
    model = make_checkpoint(folder, max_position_embeddings=4096)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    return model


def run_chaos(model: Path, plan: ChaosPlan) -> ChaosReport:
    """Start the system, strike it, and judge. Takes `duration_s` and about half a minute more."""
    report = ChaosReport(plan)
    requests = make_requests(plan.seed, plan.requests)
    began = time.monotonic()

    def phase_ended(name: str) -> None:
        report.phases_s[name] = round(time.monotonic() - began - sum(report.phases_s.values()), 1)

    with chaos_cluster(model, plan) as (system, proxies):
        phase_ended("start")
        expected = asyncio.run(undisturbed(system, requests))
        for worker in system.workers:
            worker.flush_cache()
        report.failures += [
            f"{_name(request)} in peace: {expected[request.number].error}"
            for request in requests
            if expected[request.number].error and request.kind != "invalid"
        ]
        phase_ended("peace")
        asyncio.run(under_blows(system, proxies, model, plan, requests, report, expected))
        phase_ended("blows")
        if len(report.near_ties) > MOST_TIES:
            report.failures.append(f"too many near ties for chance: {report.near_ties}")
        _settle(system, report)
        report.log += system.log
        report.failures += unforeseen(report.log)
        phase_ended("settle")
    return report


def _name(request: ChaosRequest) -> str:
    return f"chaos-{request.number} ({request.kind}, {request.path}, {request.body})"


def unforeseen(log: str) -> list[str]:
    """Every traceback in a log that no fault point is the cause of."""
    found = []
    for part in log.split("Traceback (most recent call last):")[1:]:
        lines = part.splitlines()
        end = next((i for i, line in enumerate(lines[1:], 1) if line[:1].strip()), len(lines) - 1)
        if "injected fault" not in lines[end]:
            found.append("a traceback: " + "\n".join(lines[max(0, end - 6) : end + 1]))
    return found


def _settle(system: Cluster, report: ChaosReport) -> None:
    """Everything is whole again: workers attached, pools balanced, the router's books empty."""
    try:
        system.wait_ready(60)
        report.balanced_after_s = system.wait_balanced(BALANCE_S)
        wait_until(lambda: not any(_books(system).values()), 10, "the router to be done")
    except AssertionError as error:
        report.failures.append(f"at the end: {error}; router: {_books(system)}")
    report.retries = _samples(system, "diptych_router_retries_total")


def _books(system: Cluster) -> dict[str, float]:
    names = ("in_flight", "queued", "waiting")
    return {
        name: sum(_samples(system, f"diptych_router_generations_{name}").values()) for name in names
    }


def _samples(system: Cluster, name: str) -> dict[str, float]:
    found = {}
    for line in system.get("/metrics").text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            sample, _, value = line.rpartition(" ")
            found[sample.removeprefix(name)] = float(value)
    return found
