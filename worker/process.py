"""The service process of a worker: starts the engine, serves gRPC, reports load, shuts down.

It holds no model and no KV, and does not import torch. If the engine process ends unasked, so does
this one with a non-zero status: whoever supervises the worker starts both afresh, with a new epoch.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

import grpc
from prometheus_client import CollectorRegistry, Gauge

from core.clock import monotonic
from rpc.auth import Credentials
from rpc.server import RpcServer, build_server
from rpc.v1 import ipc_pb2, worker_pb2, worker_pb2_grpc
from telemetry.faults import Faults, Point, parse_faults
from telemetry.metrics import serve_metrics
from worker.engine_child import EngineChild
from worker.faulty_links import FaultySwitchboard
from worker.ipc import ServicePipe
from worker.service import EngineView, WorkerService
from worker.settings import WorkerSettings
from worker.switchboard import Switchboard

log = logging.getLogger(__name__)

WORKER_SERVICE = "diptych.v1.Worker"
_SERVER_GRACE_S = 1.0


class Extension(Protocol):
    """What a role adds to the service process."""

    def register(self, server: grpc.aio.Server) -> None:
        """Add services before the server starts."""
        ...

    def open_link(self, request: ipc_pb2.OpenLink) -> None:
        """The engine wants a KvExport link."""
        ...

    async def close(self) -> None:
        """Drop what was opened."""
        ...


BuildExtension = Callable[[Switchboard, Credentials], Extension]


class EngineFailedError(Exception):
    """The engine process could not start, or ended unasked."""


def credentials_of(settings: WorkerSettings) -> Credentials:
    """What this worker proves itself with, and asks of its peers."""
    token = settings.auth_token
    return Credentials.from_settings(
        token=token.get_secret_value() if token else None,
        cert=settings.tls_cert,
        key=settings.tls_key,
        ca=settings.tls_ca,
        server_name=settings.tls_server_name,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleProcesses:
    """What makes a worker a prefill or a decode worker."""

    name: str
    engine_module: str
    """Run with `python -m` as the engine process."""
    build_extension: BuildExtension
    services: Sequence[str] = ()
    """Full names of the gRPC services that the extension registers."""


async def serve_worker(settings: WorkerSettings, role: RoleProcesses) -> int:
    """Run a worker until SIGTERM or SIGINT; returns the process's exit status.

    The first signal drains, a second one ends at once.
    """
    credentials = credentials_of(settings)
    server = build_server(credentials, services=[WORKER_SERVICE, *role.services])
    port = server.bind(settings.host, settings.port, insecure=settings.insecure)
    settings = _settle(settings, role.name, port)
    signals: asyncio.Queue[int] = asyncio.Queue()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, signals.put_nowait, signum)
    async with AsyncExitStack() as stack:
        child = await EngineChild.start(settings, role.engine_module)
        stack.push_async_callback(child.end)
        view = EngineView(stall_after_s=settings.stall_after_s, clock=monotonic)
        switchboard = _switchboard(settings, child.pipe)
        service = WorkerService(child.pipe, switchboard, view)
        extension = role.build_extension(switchboard, credentials)
        stack.push_async_callback(extension.close)
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server.grpc_server)
        extension.register(server.grpc_server)
        await server.start()
        stack.push_async_callback(server.stop, _SERVER_GRACE_S)
        metrics = await serve_metrics(
            process_registry(view, switchboard),
            settings.host,
            settings.metrics_port,
            extra=lambda: [view.metrics],
            healthy=lambda: view.live,
            ready=lambda: view.ready,
        )
        stack.callback(metrics.close)
        metrics_port = metrics.sockets[0].getsockname()[1]
        log.info("listening on %s:%d, metrics on port %d", settings.host, port, metrics_port)
        events = _read_events(child.pipe, view, switchboard, service, extension)
        tasks = [
            asyncio.create_task(events),
            asyncio.create_task(_report(view, switchboard, settings.report_interval_s)),
            asyncio.create_task(_serve_until_told(settings, view, server, service, signals)),
        ]
        stack.callback(lambda: [task.cancel() for task in tasks])
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        try:
            for task in done:
                task.result()
        except EngineFailedError as error:
            log.error("%s", error)
            return 1
    return 0


async def _serve_until_told(
    settings: WorkerSettings,
    view: EngineView,
    server: RpcServer,
    service: WorkerService,
    signals: "asyncio.Queue[int]",
) -> None:
    """Wait for the engine, serve, and drain at the first signal."""
    stop = asyncio.create_task(signals.get())
    start = asyncio.create_task(_watch_start(view, settings.start_timeout_s))
    try:
        await asyncio.wait({stop, start}, return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            return
        start.result()
        await server.set_serving(True)
        log.info("%s is ready", settings.worker_id, extra={"stage": "ready"})
        await stop
        await server.set_serving(False)
        drain = asyncio.create_task(_drain(service, settings.drain_timeout_s))
        hurry = asyncio.create_task(signals.get())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        hurry.cancel()
    finally:
        stop.cancel()
        start.cancel()


def _switchboard(settings: WorkerSettings, pipe: ServicePipe) -> Switchboard:
    faults = Faults(parse_faults(settings.faults), settings.worker_id or "")
    if faults.has(Point.LINK_OPEN, Point.LINK_SEND, Point.LINK_RECEIVE):
        return FaultySwitchboard(pipe, faults)
    return Switchboard(pipe)


def process_registry(view: EngineView, switchboard: Switchboard) -> CollectorRegistry:
    """Metrics of the service process itself."""
    registry = CollectorRegistry()
    Gauge(
        "diptych_engine_heartbeat_age_seconds",
        "Time since the engine loop last turned.",
        registry=registry,
    ).set_function(lambda: view.heartbeat_age_s)
    Gauge(
        "diptych_attached_streams", "Streams of routers and peers that are open.", registry=registry
    ).set_function(lambda: float(len(switchboard)))
    return registry


def _settle(settings: WorkerSettings, role: str, port: int) -> WorkerSettings:
    """Fill in what follows from the port and the model."""
    model = settings.model.rstrip("/").rsplit("/", 1)[-1]
    return settings.model_copy(
        update={
            "port": port,
            "worker_id": settings.worker_id or f"{role}-{settings.host}:{port}",
            "served_model_name": settings.served_model_name or model,
        }
    )


async def _read_events(
    pipe: ServicePipe,
    view: EngineView,
    switchboard: Switchboard,
    service: WorkerService,
    extension: Extension,
) -> None:
    """Carry out what the engine says; raises EngineFailedError when its pipe ends."""
    async for event in pipe.events():
        match event.WhichOneof("body"):
            case "worker":
                switchboard.to_router(event.worker)
            case "heartbeat":
                view.on_heartbeat(event.heartbeat)
            case "prefill":
                switchboard.to_peer(event.prefill)
            case "decode":
                switchboard.to_peer(event.decode)
            case "open":
                extension.open_link(event.open)
            case "close":
                switchboard.close(event.close.channel, event.close.reason)
            case "reply":
                service.on_reply(event.reply)
            case "progress":
                stage = event.progress.stage
                log.info("starting: %s", stage, extra={"stage": stage})
            case "ready":
                view.description = event.ready.worker
            case "failed":
                raise EngineFailedError(
                    f"the engine could not start ({event.failed.error_code}): "
                    f"{event.failed.error_message}"
                )
            case other:
                log.warning("ignored an engine event of unknown kind %s", other)
    raise EngineFailedError("the engine process ended unasked")


async def _watch_start(view: EngineView, timeout_s: float) -> None:
    give_up_at = monotonic() + timeout_s
    while not view.ready:
        if monotonic() > give_up_at:
            raise EngineFailedError(f"the engine was not ready after {timeout_s:.0f} s")
        await asyncio.sleep(0.02)


async def _report(view: EngineView, switchboard: Switchboard, interval_s: float) -> None:
    """Tell every router how this worker fares; their only sign that this process lives."""
    while True:
        switchboard.broadcast(worker_pb2.WorkerMessage(load=view.load()))
        await asyncio.sleep(interval_s)


async def _drain(service: WorkerService, timeout_s: float) -> None:
    log.info("draining for up to %.0f s", timeout_s)
    try:
        response = await service.drain(worker_pb2.DrainRequest(timeout_ms=int(timeout_s * 1000)))
    except TimeoutError:
        log.warning("the engine did not answer the drain")
        return
    if not response.drained:
        log.warning("ending with %d requests and %d leases", response.running, response.leases)
