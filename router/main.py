"""Entry of the router: puts the HTTP side on top of the fleet side, and runs both.

The first SIGTERM or SIGINT stops admission and lets running requests finish within the grace; the
second one ends at once. Either way each worker is told about each request that it need not go on
with, at the latest by the end of its stream.
"""

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn
import uvloop
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    ProcessCollector,
)

from core.clock import monotonic
from core.errors import ConfigError
from core.modelfile.resolve import resolve_model
from core.settings import load_or_exit
from core.version import installed_version
from router.api.settings import ApiSettings
from router.api.slo import SloTargets
from router.app import create_app
from router.dispatch import Dispatcher
from router.fleet.discovery import static_members
from router.fleet.fleet import Fleet
from router.fleet.link import LinkSettings
from router.metrics import FleetMetrics
from router.observer import Observer
from router.placement.cost import CostSettings
from router.placement.placer import Placer
from router.settings import RouterSettings
from router.spans import open_spans
from router.text.loading import load_text
from router.text.processor import TextProcessor
from rpc.auth import Credentials
from rpc.channel import open_channel
from telemetry.logs import setup
from telemetry.metrics import ProcessRegistry, show_build

log = logging.getLogger(__name__)

BACKLOG = 2048
"""Connections that may wait to be accepted."""
FLUSH_S = 2.0
"""Time that answers have to reach their clients once the last request has ended."""


def main(argv: Sequence[str]) -> int:
    """Run a router until it is told to stop; returns the exit status."""
    settings = load_or_exit(
        RouterSettings, argv, prog="diptych router", env_prefix="DIPTYCH_ROUTER_"
    )
    token = settings.auth_token.get_secret_value() if settings.auth_token else None
    setup(settings.log_level, settings.log_format, "router", secrets=[token] if token else [])
    try:
        text = load_text(
            resolve_model(settings.model, log.info),
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(settings, text, token))
    except ConfigError as error:
        log.error("can't start: %s", error)
        return 2
    return 0


async def serve(settings: RouterSettings, text: TextProcessor, token: str | None) -> None:
    """Serve until a signal.

    Raises:
        ConfigError: the port is taken, or a setting does not fit another.
    """
    listener = listen(settings.host, settings.port)
    registry = router_registry()
    async with dispatcher_on_fleet(settings, registry, token) as (dispatcher, fleet):
        # Nothing in here raises ConfigError: the task group inside would wrap it.
        app = create_app(
            generator=dispatcher,
            fleet=fleet,
            facts={
                "version": installed_version(),
                **settings.model_dump(mode="json", exclude={"auth_token", "tls_key"}),
            },
            text=text,
            settings=ApiSettings(
                served_model_name=settings.served_model_name,
                default_timeout_s=settings.request_timeout_s,
                max_in_flight=settings.max_in_flight + settings.max_queued,
                recent_requests=settings.timelines,
                console=settings.console,
                slo=SloTargets(
                    ttft_s=settings.slo_ttft_s,
                    tpot_s=settings.slo_tpot_s,
                    itl_s=settings.slo_itl_s,
                ),
            ),
            observed=Observer(fleet, dispatcher),
            registry=registry,
        )
        server = _Server(
            uvicorn.Config(
                app,
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(settings.shutdown_grace_s + FLUSH_S) + 1,
            )
        )
        host, port = listener.getsockname()[:2]
        log.info("listening on http://%s:%d", host, port)
        async with asyncio.TaskGroup() as group:
            stop = group.create_task(_stop_on_signal(server, dispatcher, settings.shutdown_grace_s))
            await server.serve(sockets=[listener])
            stop.cancel()


def router_registry() -> CollectorRegistry:
    """Registry of this process, with what is known before any part of it is built."""
    registry = ProcessRegistry()
    show_build(registry, "router", installed_version())
    ProcessCollector(namespace="diptych_router", registry=registry)
    GCCollector(registry=registry)
    return registry


@asynccontextmanager
async def dispatcher_on_fleet(
    settings: RouterSettings, registry: CollectorRegistry, token: str | None
) -> AsyncIterator[tuple[Dispatcher, Fleet]]:
    """The Generator of a router and its workers, linked for as long as the context lasts.

    Raises:
        ConfigError: no worker is named, or TLS files are missing.
    """
    credentials = Credentials.from_settings(
        token=token, ca=settings.tls_ca, cert=settings.tls_cert, key=settings.tls_key
    )
    router_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    fleet = Fleet(
        static_members(settings.prefill, settings.decode),
        partial(open_channel, credentials=credentials),
        LinkSettings(
            router_id=router_id,
            version=installed_version(),
            connect_timeout_s=settings.connect_timeout_s,
            silence_s=settings.worker_silence_s,
            reconnect_max_s=settings.reconnect_max_s,
            queue_size=settings.link_queue,
        ),
    )
    placer = Placer(
        CostSettings(
            prefill_tokens_per_s=settings.default_prefill_tokens_per_s,
            decode_step_s=settings.default_decode_step_s,
            transfer_bytes_per_s=settings.transfer_bytes_per_s,
        ),
        local_prefill_max_tokens=settings.local_prefill_max_tokens,
        prediction_ttl_s=settings.prediction_ttl_s,
    )
    spans = open_spans(
        settings.trace_endpoint, router_id=router_id, ratio=settings.trace_ratio, clock=monotonic
    )
    dispatcher = Dispatcher(fleet, placer, settings, FleetMetrics(registry), monotonic, spans)
    async with asyncio.TaskGroup() as group:
        links = group.create_task(fleet.run(dispatcher), name="fleet")
        try:
            yield dispatcher, fleet
        finally:
            links.cancel()
            await asyncio.to_thread(spans.close)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ConfigError: the port is taken, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Can't listen on {host}:{port}: {error.strerror}. Choose another host or port."
        ) from None


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the links."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _stop_on_signal(server: uvicorn.Server, dispatcher: Dispatcher, grace_s: float) -> None:
    first, second = asyncio.Event(), asyncio.Event()

    def note() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, note)
    await first.wait()
    log.info("told to stop: running requests may finish within %g s", grace_s)
    server.should_exit = True
    async with asyncio.TaskGroup() as group:
        drained = group.create_task(dispatcher.drain(grace_s))
        forced = group.create_task(second.wait())
        await asyncio.wait((drained, forced), return_when=asyncio.FIRST_COMPLETED)
        if forced.done():
            log.warning("told again to stop: ending at once")
            server.force_exit = True
        drained.cancel()
        forced.cancel()
