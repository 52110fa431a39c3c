"""Prometheus metrics of a worker's service process, and of its engine as seen from outside."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from core.version import installed_version
from telemetry.metrics import ProcessRegistry, show_build
from worker.service import EngineView


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
