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
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import grpc
import httpx

from tests.support.chaos_requests import (
    TEMPLATE,
    Answer,
    ChaosRequest,
    answer_within,
    difference,
    make_requests,
)
from tests.support.chaos_schedule import Blow, make_schedule
from tests.support.cluster import START_S, Cluster, Worker, make_worker, routed
from tests.support.models import make_checkpoint
from tests.support.process import frozen, wait_until
from tests.support.proxy import Proxy, proxy

STEP_DELAY = "engine.step:delay=40ms"
"""Makes a tiny model slow enough for blows to fall amid answers, without work for the processor."""
WORKER = {
    "kv_cache_memory": "4MiB",
    "max_num_seqs": 16,
    "max_step_tokens": 64,
    "stall_after_s": "2s",
    "drain_timeout_s": "5s",
    "served_model_name": "chaos",
    "faults": STEP_DELAY,
}
ROUTER = {
    "worker_silence_s": "1500ms",
    "connect_timeout_s": "3s",
    "no_worker_grace_s": "30s",
    "request_timeout_s": "60s",
    "max_attempts": 12,
    "served_model_name": "chaos",
}
VARIED_WORKER: dict[str, Sequence[object]] = {
    "kv_cache_memory": ["1536KiB", "2MiB", "4MiB"],
    "host_kv_memory": [0, "2MiB"],
    "max_step_tokens": [32, 64, 512],
    "block_size": [8, 16],
    "attention_backend": ["auto", "torch_native"],
}
VARIED_ROUTER: dict[str, Sequence[object]] = {
    "local_prefill_max_tokens": [0, 40],
    "max_in_flight": [10, 1024],
    "faults": [
        "",
        "rpc.link.receive:cut@0.0005",
        "rpc.link.send:cut@0.001",
        "rpc.link.receive:delay=5ms@0.3",
    ],
}
LIMIT_S = 70.0
"""Longest that a request may take by the client's clock: the router's own limit and some."""
BALANCE_S = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosPlan:
    """What is done to the system. Everything but the processes' own timing follows from it."""

    seed: int
    requests: int = 200
    duration_s: float = 40.0
    prefill: int = 3
    decode: int = 3
    transport: str = "tcp"
    vary: bool = False
    """Other settings of workers and router with every seed."""

    @property
    def worker_settings(self) -> dict[str, object]:
        source = random.Random(f"workers/{self.seed}")
        return _varied(WORKER, VARIED_WORKER, source) if self.vary else dict(WORKER)

    @property
    def router_settings(self) -> dict[str, object]:
        source = random.Random(f"router/{self.seed}")
        return _varied(ROUTER, VARIED_ROUTER, source) if self.vary else dict(ROUTER)

    @property
    def schedule(self) -> list[Blow]:
        return make_schedule(
            self.seed, prefill=self.prefill, decode=self.decode, duration_s=self.duration_s
        )


@dataclass(slots=True)
class ChaosReport:
    """What came of it."""

    plan: ChaosPlan
    failures: list[str] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)
    """By kind of request."""
    left_out: list[Blow] = field(default_factory=list)
    """Blows that would have left nobody to go on: others had not come back in time."""
    retries: dict[str, float] = field(default_factory=dict)
    balanced_after_s: float = 0.0
    phases_s: dict[str, float] = field(default_factory=dict)
    log: str = ""

    def __str__(self) -> str:
        schedule = "\n".join(map(str, self.plan.schedule))
        return "\n".join(
            [
                f"plan: {self.plan}",
                f"workers: {self.plan.worker_settings}; router: {self.plan.router_settings}",
                schedule,
                f"answers: {dict(self.answers)}; attempts that failed: {self.retries}; "
                f"balanced after {self.balanced_after_s:.1f} s; phases {self.phases_s}",
                *(f"left out: {blow}" for blow in self.left_out),
                *(f"FAILURE {failure}" for failure in self.failures),
            ]
        )


def _varied(
    settings: Mapping[str, object], varied: Mapping[str, Sequence[object]], source: random.Random
) -> dict[str, object]:
    return {**settings, **{name: source.choice(each) for name, each in varied.items()}}


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
    turn = asyncio.Semaphore(48)
    async with httpx.AsyncClient(base_url=system.url, timeout=LIMIT_S, trust_env=False) as client:

        async def one(request: ChaosRequest) -> Answer:
            async with turn:
                return await answer_within(client, request, LIMIT_S, stay=True)

        answers = await asyncio.gather(*map(one, requests))
    return {request.number: each for request, each in zip(requests, answers, strict=True)}


async def under_blows(
    system: Cluster,
    proxies: Sequence[Proxy],
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
        if wrong:
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
    try:
        worker.describe()
    except grpc.RpcError:
        return False
    return True


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
        asyncio.run(under_blows(system, proxies, plan, requests, report, expected))
        phase_ended("blows")
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
