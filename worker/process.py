"""The service process of a worker: starts the engine, serves gRPC, reports load, shuts down.

It holds no model and no KV, and does not import torch. If the engine process ends unasked, so does
this one with a non-zero status: whoever supervises the worker starts both afresh, with a new epoch.
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Protocol

import grpc

from core.clock import monotonic
from core.errors import ConfigError, ErrorCode
from rpc.auth import Credentials
from rpc.server import RpcServer, build_server
from rpc.v1 import ipc_pb2, nodes_pb2_grpc, worker_pb2, worker_pb2_grpc
from telemetry.faults import Faults, Point, parse_faults
from worker.engine_child import EngineChild, EngineFailedError
from worker.exit_status import EXIT_FAILED, EXIT_NODE_LOST, EXIT_REFUSED
from worker.faulty_links import FaultySwitchboard
from worker.following import serve_follower
from worker.ipc import ServicePipe
from worker.leading import NODES_SERVICE, NodeLostError, NodesService
from worker.placement import PlacementError, RayPlacement
from worker.process_metrics import open_metrics_port, process_registry
from worker.service import EngineView, WorkerService
from worker.settings import WorkerSettings
from worker.stopping import StopRequests
from worker.switchboard import Switchboard

log = logging.getLogger(__name__)

WORKER_SERVICE = "diptych.v1.Worker"
_SERVER_GRACE_S = 1.0
_LEAVE_S = 3.0
"""Time for the step under way at the end, and for last words to reach whoever still reads."""


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


def run_worker(settings: WorkerSettings, role: RoleProcesses) -> int:
    """Run a worker, or one node of it, until SIGTERM or SIGINT; returns the process's exit status.

    The first signal drains, a second one ends at once. What still runs at the end is handed back to
    its routers, which take it to other workers. What can't be served, such as a port that is taken,
    is told in one line.
    """
    try:
        return asyncio.run(_serve(settings, role))
    except ConfigError as error:
        log.error("can't start: %s", error)
        return EXIT_REFUSED


async def _serve(settings: WorkerSettings, role: RoleProcesses) -> int:
    credentials = credentials_of(settings)
    signals: asyncio.Queue[int] = asyncio.Queue()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, signals.put_nowait, signum)
    if settings.node_rank > 0:
        return await serve_follower(settings, role.name, credentials, signals)
    own_services = [WORKER_SERVICE] if settings.nodes == 1 else [WORKER_SERVICE, NODES_SERVICE]
    server = build_server(credentials, services=[*own_services, *role.services])
    port = server.bind(settings.host, settings.port, insecure=settings.insecure)
    settings = _settle(settings, role.name, port)
    async with AsyncExitStack() as stack:
        nodes = None
        if settings.nodes > 1:
            nodes = await NodesService.open(settings, role.name, monotonic)
            stack.callback(nodes.close)
            nodes_pb2_grpc.add_NodesServicer_to_server(nodes, server.grpc_server)
        child = await EngineChild.start(
            settings, role.engine_module, nodes.engine_ends if nodes else None
        )
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
        registry = process_registry(
            role=role.name,
            view=view,
            num_streams=lambda: len(switchboard),
            engine_pid=child.pid,
        )
        if nodes:
            nodes.register(registry)
        metrics = await open_metrics_port(
            registry,
            settings,
            extra=lambda: [view.metrics],
            labels={"role": role.name, "worker": settings.worker_id or ""},
            healthy=lambda: view.live,
            ready=lambda: view.ready,
        )
        stack.callback(metrics.close)
        metrics_port = metrics.sockets[0].getsockname()[1]
        log.info("listening on %s:%d, metrics on port %d", settings.host, port, metrics_port)
        told = StopRequests(signals, nodes.stopping if nodes else None)
        events = _read_events(child.pipe, view, switchboard, service, extension)
        reading = asyncio.create_task(events)
        tasks = [
            reading,
            asyncio.create_task(_report(view, switchboard, settings.report_interval_s)),
            asyncio.create_task(_serve_until_told(settings, view, server, service, told)),
        ]
        if nodes:
            tasks.append(asyncio.create_task(nodes.watch()))
        if settings.placement == "ray":
            placement = await RayPlacement.start(settings, role.name)
            stack.push_async_callback(placement.close)
            tasks.append(asyncio.create_task(placement.watch()))
        stack.callback(lambda: [task.cancel() for task in tasks])
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        status, reason = _outcome(done, nodes)
        if view.description is None:
            child.abandon()
        elif status == 0:
            await _take_leave(child, reading, switchboard)
        else:
            await _close_links(switchboard)
        if nodes:
            if status == 0:
                await child.end()  # while other nodes can hear of it through this process
                if nodes.lost:  # one that was told to end did so before the rest
                    log.error("%s", nodes.lost)
                    status, reason = EXIT_NODE_LOST, nodes.lost
            await nodes.dismiss(reason or "it was told to end")
    return status


def _outcome(done: "set[asyncio.Task[None]]", nodes: NodesService | None) -> tuple[int, str]:
    """Exit status and what went wrong, of the first tasks that ended."""
    errors = [error for task in done if (error := task.exception()) is not None]
    for error in errors:
        if not isinstance(error, (NodeLostError, PlacementError, EngineFailedError)):
            raise error
    if not errors:
        return 0, ""
    error = min(errors, key=lambda error: isinstance(error, EngineFailedError))
    waited = isinstance(error, EngineFailedError) and error.waited
    missing = nodes.missing if nodes and waited else ""
    reason = f"{str(error).rstrip('.')}: {missing} did not join" if missing else str(error)
    log.error("%s", reason)
    if isinstance(error, PlacementError):
        return error.status, reason
    lost = isinstance(error, NodeLostError) or missing
    return EXIT_NODE_LOST if lost else EXIT_FAILED, reason


async def _take_leave(
    child: EngineChild, reading: "asyncio.Task[None]", switchboard: Switchboard
) -> None:
    """End the engine; its last words reach routers and peers before their streams end."""
    child.stop()
    try:
        async with asyncio.timeout(_LEAVE_S):
            with suppress(EngineFailedError):
                await reading
            await switchboard.close_all("the worker is ending")
    except TimeoutError:
        log.warning("the engine or a peer did not take leave within %.0f s", _LEAVE_S)


async def _close_links(switchboard: Switchboard) -> None:
    """Let routers and peers know at once that the engine is gone, not when the server ends."""
    try:
        async with asyncio.timeout(_SERVER_GRACE_S):
            await switchboard.close_all("the worker is ending")
    except TimeoutError:
        log.warning("a peer did not take leave within %.0f s", _SERVER_GRACE_S)


async def _serve_until_told(
    settings: WorkerSettings,
    view: EngineView,
    server: RpcServer,
    service: WorkerService,
    told: StopRequests,
) -> None:
    """Wait for the engine, serve, and drain when told to stop."""
    stop = asyncio.create_task(told.wait())
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
        hurry = asyncio.create_task(told.again())
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
                view.on_ready(event.ready.worker)
            case "failed":
                code = event.failed.error_code
                raise EngineFailedError(
                    f"the engine could not start ({code}): {event.failed.error_message}",
                    waited=code == ErrorCode.WORKER_LOST,
                )
            case other:
                log.warning("ignored an engine event of unknown kind %s", other)
    raise EngineFailedError("the engine process ended unasked")


async def _watch_start(view: EngineView, timeout_s: float) -> None:
    give_up_at = monotonic() + timeout_s
    while not view.ready:
        if monotonic() > give_up_at:
            raise EngineFailedError(
                f"the engine was not ready after {timeout_s:.0f} s", waited=True
            )
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
        log.warning(
            "%d requests and %d leases are left after the drain", response.running, response.leases
        )
