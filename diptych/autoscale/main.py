"""`diptych autoscale`: the controller as a process of its own, until SIGTERM or SIGINT."""

import asyncio
import logging
import signal
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from core.clock import monotonic
from core.errors import ConfigError
from core.settings import load_or_exit
from diptych.autoscale.loop import Controller, Metrics, Pool, Source
from diptych.autoscale.policy import PoolScaler
from diptych.autoscale.prometheus import PrometheusSource
from diptych.autoscale.routers import RouterSource
from diptych.autoscale.scale_api import ScaleApi, Target
from diptych.autoscale.settings import AutoscaleSettings
from diptych.autoscale.signals import SignalWindow
from telemetry.logs import setup
from telemetry.metrics import serve_metrics

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""Time that routers have to answer."""
MISSED_TURNS = 5
"""Intervals without a turn after which the process counts as stuck; a turn's own waits added."""
SLOWEST_TURN_S = 90.0


def main(argv: Sequence[str]) -> int:
    """Scale until told to stop; returns the exit status."""
    settings = load_or_exit(
        AutoscaleSettings, argv, prog="diptych autoscale", env_prefix="DIPTYCH_AUTOSCALE_"
    )
    key = _secret(settings)
    setup(settings.log_level, settings.log_format, "autoscale", secrets=[key] if key else [])
    try:
        asyncio.run(serve(settings))
    except (ConfigError, OSError) as error:
        log.error("can't start: %s", error)
        return 2
    return 0


def source_of(settings: AutoscaleSettings) -> Source:
    """Where signals come from."""
    if settings.prometheus is not None:
        return PrometheusSource(
            settings.prometheus, settings.prometheus_match, settings.targets, timeout_s=TIMEOUT_S
        )
    window = SignalWindow(settings.targets, settings.window_s)
    return RouterSource(
        settings.router,
        window,
        api_key=_secret(settings),
        timeout_s=TIMEOUT_S,
        clock=monotonic,
    )


def _secret(settings: AutoscaleSettings) -> str | None:
    return settings.api_key.get_secret_value() if settings.api_key else None


async def serve(settings: AutoscaleSettings) -> None:
    """Scale until a signal.

    Raises:
        ConfigError: there is no API server, or the client for it is not installed.
        OSError: the metrics port is taken.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    scales = ScaleApi(settings.namespace)
    registry = CollectorRegistry()
    bounds = {
        "prefill": (settings.prefill, settings.prefill_min, settings.prefill_max),
        "decode": (settings.decode, settings.decode_min, settings.decode_max),
    }
    controller = Controller(
        {
            role: Pool(target=Target.parse(target), scaler=PoolScaler(settings.pace(least, most)))
            for role, (target, least, most) in bounds.items()
            if target is not None
        },
        source_of(settings),
        scales,
        Metrics(registry),
        monotonic,
        dry_run=settings.dry_run,
    )
    patience_s = MISSED_TURNS * settings.interval_s + SLOWEST_TURN_S
    server = await serve_metrics(
        registry,
        settings.host,
        settings.metrics_port,
        healthy=lambda: monotonic() - controller.turned_at < patience_s,
    )
    port = server.sockets[0].getsockname()[1]
    log.info(
        "scaling in namespace %s by what %s says, metrics on port %d%s",
        scales.namespace,
        settings.prometheus or settings.router,
        port,
        ", changing nothing" if settings.dry_run else "",
    )
    async with server, asyncio.TaskGroup() as group:
        turns = group.create_task(controller.run(settings.interval_s))
        await stop.wait()
        turns.cancel()
