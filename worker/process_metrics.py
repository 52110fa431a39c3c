"""Prometheus metrics of a worker's service process, and of its engine as seen from outside."""

import asyncio
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from core.errors import ConfigError
from core.version import installed_version
from telemetry.metrics import ProcessRegistry, serve_metrics, show_build
from worker.service import EngineView
from worker.settings import WorkerSettings


async def open_metrics_port(
    registry: CollectorRegistry,
    settings: WorkerSettings,
    *,
    labels: Mapping[str, str],
    ready: Callable[[], bool],
    healthy: Callable[[], bool] = lambda: True,
    extra: Callable[[], Iterable[bytes]] = tuple,
) -> asyncio.Server:
    """`serve_metrics` where the settings say.

    Raises:
        ConfigError: the port is taken, or the host is not an address of this host.
    """
    try:
        return await serve_metrics(
            registry,
            settings.host,
            settings.metrics_port,
            extra=extra,
            labels=labels,
            healthy=healthy,
            ready=ready,
        )
    except OSError as error:
        raise ConfigError(f"{error.strerror}. Choose another metrics_port.") from None


def process_registry(
    *,
    role: str,
    view: EngineView,
    num_streams: Callable[[], int],
    engine_pid: int,
) -> CollectorRegistry:
    """What the service process shows of itself, and sees of its engine from outside.

    The engine process is watched from here, so that it can be when it hangs.

    Args:
        role: prefill or decode.
        view: what is known of the engine.
        num_streams: asked at each scrape.
        engine_pid: the engine process.
    """
    registry = ProcessRegistry()
    show_build(registry, role, installed_version())
    ProcessCollector(namespace="diptych_worker", registry=registry)
    ProcessCollector(namespace="diptych_engine", pid=lambda: engine_pid, registry=registry)
    Gauge(
        "diptych_worker_ready", "1 while a request would be admitted, else 0.", registry=registry
    ).set_function(lambda: float(view.ready))
    Gauge(
        "diptych_worker_startup_seconds",
        "Time to load the model and build the engine; grows until that is done.",
        registry=registry,
    ).set_function(lambda: view.startup_s)
    Gauge(
        "diptych_engine_heartbeat_age_seconds",
        "Time since the engine loop last turned.",
        registry=registry,
    ).set_function(lambda: view.heartbeat_age_s)
    Gauge(
        "diptych_attached_streams", "Streams of routers and peers that are open.", registry=registry
    ).set_function(lambda: float(num_streams()))
    return registry
