"""Facts about workers and the router, as they can be reached from here. Nothing is judged here.

A name that stands for several addresses, as that of a headless Service does, is looked at address
by address. Every wait has a deadline of its own, so that one dead peer hides no other.
"""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, cast

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import worker_pb2, worker_pb2_grpc

RECENT_S = 600.0
"""Older requests say nothing of how things are now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker, or a name that stands for none."""

    address: str
    """host:port; the host is an IP address if its name stands for several."""
    listed: str
    """Role that it is listed as."""
    dns_error: str = ""
    tcp_error: str = ""
    speaks_tls: bool = False
    health: str = ""
    """SERVING or NOT_SERVING; empty if nobody answered."""
    health_error: str = ""
    description: worker_pb2.WorkerDescription | None = None
    call_code: str = ""
    """Status of the call that needs the token, if it failed."""
    call_error: str = ""
    metrics_error: str = ""
    clock_skew_s: float | None = None
    """How far its clock is ahead of ours; known to a second."""
    link_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """Prefill worker to the measured speed of the link from it."""
    failing_links: Sequence[str] = ()
    """Prefill workers from which no test block came as it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFacts:
    """The router."""

    url: str
    error: str = ""
    """Why it can't be reached."""
    ready: bool = False
    not_ready: str = ""
    clock_skew_s: float | None = None
    fleet_status: int = 0
    """HTTP status of its list of workers."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Worker that it can't reach to why."""
    attached: Mapping[str, int] = field(default_factory=dict)
    """Role to workers that it can use."""
    dark_links: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Prefill and decode worker between which no KV moves, to why."""
    modes: Sequence[str] = ()
    """How the requests of the last RECENT_S were served, newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How peers are asked."""

    credentials: Credentials
    timeout_s: float
    metrics_port: int
    """0: their metrics are not asked for."""


async def look_at_workers(listed: Mapping[str, str], ways: Ways) -> list[WorkerFacts]:
    """Look at all workers, side by side.

    Args:
        listed: host:port to role.
        ways: how.
    """
    found = await asyncio.gather(
        *(_look_at_name(address, role, ways) for address, role in listed.items())
    )
    return [worker for several in found for worker in several]


async def _look_at_name(address: str, role: str, ways: Ways) -> Sequence[WorkerFacts]:
    host, _, port = address.rpartition(":")
    blank = WorkerFacts(address=address, listed=role)
    try:
        async with asyncio.timeout(ways.timeout_s):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except TimeoutError:
        return [replace(blank, dns_error="no answer in time")]
    except OSError as error:
        return [replace(blank, dns_error=error.strerror or str(error))]
    hosts = sorted({str(each[4][0]) for each in found})
    if len(hosts) == 1 or host == "localhost":
        return [await _look_at_worker(blank, host, ways)]
    several = [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]
    return await asyncio.gather(
        *(_look_at_worker(replace(blank, address=each), host, ways) for each in several)
    )


async def _look_at_worker(worker: WorkerFacts, name: str, ways: Ways) -> WorkerFacts:
    """`name`: the host as it is listed, which a certificate is for."""
    host, _, port = worker.address.rpartition(":")
    error = await _tcp_error(host.strip("[]"), int(port), ways.timeout_s)
    if error:
        return replace(worker, tcp_error=error)
    tls = await _speaks_tls(host.strip("[]"), int(port), ways.timeout_s)
    worker = replace(worker, speaks_tls=tls)
    credentials = replace(ways.credentials, server_name=name.strip("[]"))
    async with open_channel(worker.address, credentials) as channel:
        worker = await _ask_health(worker, channel, ways.timeout_s)
        if worker.health:
            worker = await _ask_description(worker, channel, ways.timeout_s)
    if ways.metrics_port:
        worker = await _ask_metrics(worker, f"http://{host}:{ways.metrics_port}", ways.timeout_s)
    return worker


async def _tcp_error(host: str, port: int, timeout_s: float) -> str:
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return "no answer in time"
    except OSError as error:
        # asyncio's own text for it names the address again, and not what happened.
        return os.strerror(error.errno) if error.errno else str(error)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return ""


async def _speaks_tls(host: str, port: int, timeout_s: float) -> bool:
    """True if what listens there answers a TLS greeting; its certificate is not looked at."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


async def _ask_health(
    worker: WorkerFacts, channel: grpc.aio.Channel, timeout_s: float
) -> WorkerFacts:
    # The stub is typed for synchronous channels.
    stub = health_pb2_grpc.HealthStub(channel)
    call = cast(Awaitable[Any], stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s))
    try:
        status = (await call).status
    except grpc.aio.AioRpcError as error:
        return replace(worker, health_error=f"{error.code().name}: {error.details()}")
    return replace(worker, health=health_pb2.HealthCheckResponse.ServingStatus.Name(status))


async def _ask_description(
    worker: WorkerFacts, channel: grpc.aio.Channel, timeout_s: float
) -> WorkerFacts:
    stub = worker_pb2_grpc.WorkerStub(channel)
    call = cast(
        Awaitable[worker_pb2.DescribeResponse],
        stub.Describe(worker_pb2.DescribeRequest(), timeout=timeout_s),
    )
    try:
        return replace(worker, description=(await call).worker)
    except grpc.aio.AioRpcError as error:
        return replace(worker, call_code=error.code().name, call_error=error.details() or "")


async def _ask_metrics(worker: WorkerFacts, url: str, timeout_s: float) -> WorkerFacts:
    async with httpx.AsyncClient(timeout=timeout_s, trust_env=False) as client:
        try:
            asked_at = time.time()
            answer = await client.get(f"{url}/metrics")
            answer.raise_for_status()
            links, failing = (
                {
                    sample.labels["peer"]: sample.value
                    for family in text_string_to_metric_families(answer.text)
                    for sample in family.samples
                    if sample.name == name
                }
                for name in ("diptych_kv_link_bytes_per_second", "diptych_kv_link_failing")
            )
        except (httpx.HTTPError, ValueError) as error:
            return replace(worker, metrics_error=str(error) or type(error).__name__)
    return replace(
        worker,
        link_bytes_per_s=links,
        failing_links=[peer for peer, fails in failing.items() if fails],
        clock_skew_s=skew_s(answer, asked_at),
    )


async def look_at_router(
    url: str, api_key: str | None, timeout_s: float, trust: ssl.SSLContext | None = None
) -> RouterFacts:
    """Look at the router at `url`; its list of workers may need an administrator's key.

    `trust` judges its certificate; None: as this machine would.
    """
    facts = RouterFacts(url=url)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(
        base_url=url, timeout=timeout_s, headers=headers, trust_env=False, verify=trust or True
    ) as client:
        try:
            asked_at = time.time()
            health = await client.get("/health")
            health.raise_for_status()
            facts = replace(facts, clock_skew_s=skew_s(health, asked_at))
            ready = await client.get("/ready")
            fleet = await client.get("/v1/fleet")
            facts = replace(facts, ready=ready.status_code == 200, fleet_status=fleet.status_code)
            if not facts.ready:
                facts = replace(facts, not_ready=ready.json()["error"]["message"])
            if fleet.status_code == 200:
                facts = _with_fleet(facts, fleet.json())
            requests = await client.get("/v1/requests", params={"limit": 500})
            if requests.status_code == 200:
                recent = [each for each in requests.json()["data"] if each["age_s"] < RECENT_S]
                facts = replace(facts, modes=[each["mode"] for each in recent if each["mode"]])
        except httpx.HTTPError as error:
            return replace(facts, error=str(error) or type(error).__name__)
        except (KeyError, TypeError, ValueError):
            return replace(facts, error="it does not answer as a router")
    return facts


def _with_fleet(facts: RouterFacts, fleet: Mapping[str, Any]) -> RouterFacts:
    workers = fleet["workers"]
    attached: dict[str, int] = {"prefill": 0, "decode": 0}
    for each in workers:
        attached[each["role"]] += each["state"] == "ready"
    return replace(
        facts,
        attached=attached,
        lost={
            each["address"]: each.get("cause") or each["state"]
            for each in workers
            if each["state"] in ("lost", "stalled")
        },
        dark_links={
            (each["prefill"], each["decode"]): each["failure"]
            for each in fleet["links"]
            if each.get("failure")
        },
    )


def skew_s(answer: httpx.Response, asked_at: float) -> float | None:
    """How far the clock of who answered is ahead of ours, in seconds; None if it says no time.

    The answer's date is cut to whole seconds, and taken somewhere between question and answer.
    """
    try:
        date = parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError):
        return None
    earliest, latest = date - time.time(), date + 1 - asked_at
    return 0.0 if earliest <= 0 <= latest else min(earliest, latest, key=abs)
