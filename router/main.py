"""Entry of the router: puts the HTTP side on top of the fleet side, and runs both.

The first SIGTERM or SIGINT stops admission and lets running requests finish within the grace; the
second one ends at once. Either way each worker is told about each request that it need not go on
with, at the latest by the end of its stream.
"""

import asyncio
import gc
import logging
import os
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import uvloop
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    ProcessCollector,
)

from core.clock import monotonic
from core.errors import ConfigError
from core.modelfile.resolve import resolve_model
from core.settings import load_or_exit, secret_values
from core.version import installed_version
from core.watched import LOOK_EVERY_S
from router.access.door import Door
from router.access.key_file import KeyFile
from router.access.salt import tenant_salt
from router.api.settings import ApiSettings
from router.api.slo import SloTargets
from router.app import create_app
from router.dispatch import Dispatcher
from router.fleet.breaker import BreakerLimits
from router.fleet.breakers import Breakers
from router.fleet.discovery import Discovery
from router.fleet.faulty_link import attach_with
from router.fleet.fleet import Fleet
from router.fleet.link import LinkSettings
from router.fleet.sources import open_discovery
from router.http_protocol import ConnectionLimits
from router.http_server import HttpServer, http_server, listen
from router.metrics import FleetMetrics
from router.observer import Observer
from router.placement.cost import CostSettings
from router.placement.placer import Placer
from router.scaling import show_scaling_signals
from router.settings import RouterSettings
from router.spans import open_spans
from router.text.loading import load_text
from router.text.processor import TextProcessor
from router.tls import ServerCertificate, server_certificate
from rpc.auth import Credentials
from rpc.channel import open_channel
from telemetry.faults import Faults, parse_faults
from telemetry.logs import setup
from telemetry.metrics import ProcessRegistry, serve_metrics, show_build

log = logging.getLogger(__name__)

BREAKER_WINDOW_S = 60.0
"""A failure counts together with one before it if no more time lies between, in seconds."""
YOUNG_OBJECTS = 10_000
"""After so many more than were freed the youngest are looked at for garbage, which takes 1 ms."""
FLUSH_S = 2.0
"""Time that answers have to reach their clients once the last request has ended."""


def main(argv: Sequence[str]) -> int:
    """Run a router until it is told to stop; returns the exit status."""
    settings = load_or_exit(
        RouterSettings, argv, prog="diptych router", env_prefix="DIPTYCH_ROUTER_"
    )
    token = settings.auth_token.get_secret_value() if settings.auth_token else None
    setup(settings.log_level, settings.log_format, "router", secrets=secret_values(settings))
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
        ConfigError: the port is taken, a file can't be used, or settings do not fit each other.
    """
    key_file = KeyFile(Path(settings.api_keys)) if settings.api_keys else None
    door = _door(settings, key_file, token)
    certificate = server_certificate(settings.http_tls_cert, settings.http_tls_key)
    listener = listen(settings.host, settings.port)
    registry = router_registry()
    running: list[Dispatcher] = []
    async with (
        _metrics_port(settings, registry, lambda: any(each.ready for each in running)),
        dispatcher_on_fleet(settings, registry, token) as (dispatcher, fleet),
    ):
        running.append(dispatcher)
        # Nothing in here raises ConfigError: the task group inside would wrap it.
        app = create_app(
            generator=dispatcher,
            fleet=fleet,
            facts={"version": installed_version(), **settings.facts()},
            text=text,
            door=door,
            settings=ApiSettings(
                served_model_name=settings.served_model_name,
                default_timeout_s=settings.request_timeout_s,
                max_in_flight=settings.max_in_flight + settings.max_queued,
                recent_requests=settings.timelines,
                console=settings.console,
                body_limit_bytes=settings.max_body,
                body_timeout_s=settings.body_timeout_s,
                slo=SloTargets(
                    ttft_s=settings.slo_ttft_s,
                    tpot_s=settings.slo_tpot_s,
                    itl_s=settings.slo_itl_s,
                ),
            ),
            observed=Observer(fleet, dispatcher, dispatcher.breakers),
            registry=registry,
        )
        server = http_server(
            app,
            limits=ConnectionLimits(
                max_connections=settings.max_connections, head_timeout_s=settings.head_timeout_s
            ),
            certificate=certificate,
            shutdown_s=settings.shutdown_grace_s + FLUSH_S,
        )
        host, port = listener.getsockname()[:2]
        gc.freeze()  # or each full collection looks at all of this again, for some 20 ms
        # A step of 256 streams has a thousand small objects at once, and none of them is garbage.
        gc.set_threshold(YOUNG_OBJECTS)
        log.info("listening on %s://%s:%d", "https" if certificate else "http", host, port)
        async with asyncio.TaskGroup() as group:
            follow = group.create_task(_follow_files(door, key_file, certificate))
            stop = group.create_task(_stop_on_signal(server, dispatcher, settings.shutdown_grace_s))
            await server.serve(sockets=[listener])
            stop.cancel()
            follow.cancel()


def _door(settings: RouterSettings, key_file: KeyFile | None, token: str | None) -> Door:
    if key_file is None:
        return Door(None)
    secret = settings.cache_secret.get_secret_value() if settings.cache_secret else token
    return Door(key_file.read(), salt=tenant_salt(secret))


@asynccontextmanager
async def _metrics_port(
    settings: RouterSettings, registry: CollectorRegistry, ready: Callable[[], bool]
) -> AsyncIterator[None]:
    """The port for probes and metrics alone, if one was asked for."""
    if settings.metrics_port is None:
        yield
        return
    host = settings.metrics_host or settings.host
    try:
        server = await serve_metrics(registry, host, settings.metrics_port, ready=ready)
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}. Choose another metrics_host or metrics_port."
        ) from None
    log.info("metrics on port %d", server.sockets[0].getsockname()[1])
    try:
        yield
    finally:
        server.close()


def router_registry() -> CollectorRegistry:
    """Registry of this process, with what is known before any part of it is built."""
    registry = ProcessRegistry()
    show_build(registry, "router", installed_version())
    ProcessCollector(namespace="diptych_router", registry=registry)
    GCCollector(registry=registry)
    return registry


@asynccontextmanager
async def dispatcher_on_fleet(
    settings: RouterSettings,
    registry: CollectorRegistry,
    token: str | None,
    discovery: Discovery | None = None,
) -> AsyncIterator[tuple[Dispatcher, Fleet]]:
    """The Generator of a router and its workers, linked for as long as the context lasts.

    Args:
        settings: of the router.
        registry: gets the metrics of the fleet.
        token: what every call to a worker carries.
        discovery: where workers are found; None: where the settings say.

    Raises:
        ConfigError: nothing says where workers are, or TLS files are missing.
    """
    credentials = Credentials.from_settings(
        token=token,
        ca=settings.tls_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
        server_name=settings.tls_server_name,
    )
    faults = Faults(parse_faults(settings.faults), "router")
    faults.announce()
    router_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    fleet = Fleet(
        discovery or open_discovery(settings, registry),
        partial(open_channel, credentials=credentials),
        LinkSettings(
            router_id=router_id,
            version=installed_version(),
            connect_timeout_s=settings.connect_timeout_s,
            silence_s=settings.worker_silence_s,
            reconnect_max_s=settings.reconnect_max_s,
            queue_size=settings.link_queue,
        ),
        attach_with(faults),
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
    metrics = FleetMetrics(registry)
    limits = BreakerLimits(
        failures=settings.breaker_failures,
        window_s=BREAKER_WINDOW_S,
        open_s=settings.breaker_open_s,
        open_max_s=settings.breaker_open_max_s,
    )
    breakers = Breakers(limits, metrics, monotonic)
    dispatcher = Dispatcher(fleet, placer, settings, metrics, monotonic, spans, breakers)
    show_scaling_signals(
        registry, fleet, dispatcher, assumed_tokens_per_s=settings.default_prefill_tokens_per_s
    )
    async with asyncio.TaskGroup() as group:
        links = group.create_task(fleet.run(dispatcher), name="fleet")
        await asyncio.sleep(0)  # a static list is known before the first request comes
        try:
            yield dispatcher, fleet
        finally:
            links.cancel()
            await asyncio.to_thread(spans.close)


async def _follow_files(
    door: Door, key_file: KeyFile | None, certificate: ServerCertificate | None
) -> None:
    """Take over API keys and certificates that are replaced."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if key_file is not None:
            await key_file.follow(door)
        if certificate is not None:
            certificate.follow()


async def _stop_on_signal(server: HttpServer, dispatcher: Dispatcher, grace_s: float) -> None:
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
