"""`diptych serve`: prepares the model, starts the cluster, keeps it running until told to end.

Imports no torch and holds no model: it is there before the workers are, and must not slow them.
"""

import asyncio
import logging
import os
import secrets
import signal
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from core.errors import ConfigError, DiptychError
from core.modelfile.resolve import resolve_model
from core.settings import load_or_exit
from diptych.cluster.console import Screen
from diptych.cluster.gpus import device_of, visible_gpus
from diptych.cluster.logfiles import ChildLog, make_log_folder
from diptych.cluster.plan import ClusterPlan, free_ports, num_ports, plan_cluster, settle_port
from diptych.cluster.settings import ServeSettings, serve_settings_class
from diptych.cluster.supervisor import ClusterFailedError, RestartPolicy, Supervisor

_TOKEN_BYTES = 32
_PROBE_TIMEOUT_S = 2.0
_PROBE_INTERVAL_S = 0.1


def main(argv: Sequence[str]) -> int:
    """Run a cluster until SIGINT or SIGTERM; returns the exit status."""
    settings = load_or_exit(
        serve_settings_class(), argv, prog="diptych serve", env_prefix="DIPTYCH_SERVE_"
    )
    level = logging.getLevelNamesMapping()[settings.console_level.upper()]
    screen = Screen(Console(), console_level=level)
    try:
        plan, folder = prepare(settings, screen)
        return asyncio.run(run_cluster(plan, folder, settings, screen))
    except DiptychError as error:
        screen.end_steps()
        screen.line(f"diptych serve: error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        screen.end_steps()
        return 130


def prepare(settings: ServeSettings, screen: Screen) -> tuple[ClusterPlan, Path]:
    """Everything that can be refused before a process starts."""
    if settings.prefill + settings.decode == 0:
        raise ConfigError("A cluster needs a worker: --prefill and --decode can't both be 0.")
    port = settle_port(settings.host, settings.port)
    folder = make_log_folder(settings.log_dir)
    screen.step(f"model {settings.model}: looking for it")
    model_path = resolve_model(
        settings.model, lambda line: screen.step(f"model {settings.model}: {line}")
    )
    screen.done(f"model {settings.model}: {model_path}")
    plan = plan_cluster(
        settings.model_copy(update={"port": port}),
        model_path=model_path,
        token=secrets.token_urlsafe(_TOKEN_BYTES),
        ports=free_ports(num_ports(settings)),
        parent_pid=os.getpid(),
        num_gpus=0 if device_of(settings) == "cpu" else visible_gpus(),
    )
    return plan, folder


async def run_cluster(
    plan: ClusterPlan, folder: Path, settings: ServeSettings, screen: Screen
) -> int:
    """Start all processes and keep them running until a signal comes.

    Raises:
        ClusterFailedError: the cluster did not become ready, or a process keeps failing.
    """
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    with ExitStack() as stack:
        logs = [(spec, ChildLog(spec.name, folder, screen.child_line)) for spec in plan.children]
        for _, log in logs:
            stack.callback(log.close)
        supervisor = Supervisor(
            logs, policy=RestartPolicy(max_failures=settings.max_restarts), tell=screen.line
        )

        def on_signal() -> None:
            if interrupted.is_set():
                supervisor.kill()
            interrupted.set()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, on_signal)
            stack.callback(loop.remove_signal_handler, number)
        screen.step(f"starting {len(plan.children)} processes")
        supervisor.start()
        waits = {
            asyncio.create_task(interrupted.wait()),
            (failing := asyncio.create_task(supervisor.failed())),
            (starting := asyncio.create_task(_until_ready(plan))),
        }
        try:
            await asyncio.wait(
                waits, timeout=settings.ready_timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if starting.done():
                supervisor.mark_ready()
                screen.ready(plan, str(folder))
                waits.discard(starting)
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                raise failing.result()
            if not interrupted.is_set():
                raise _late(supervisor, settings)
        finally:
            screen.end_steps()
            for task in waits:
                task.cancel()
            if interrupted.is_set():
                screen.line("Ending; Ctrl-C again kills what is left.")
            await supervisor.stop()
    screen.line("Ended.")
    return 0


def _late(supervisor: Supervisor, settings: ServeSettings) -> ClusterFailedError:
    return supervisor.fail(
        f"The cluster was not ready after {settings.ready_timeout_s:.0f} s. "
        "If the model is only slow to load, raise --ready-timeout-s."
    )


async def _until_ready(plan: ClusterPlan) -> None:
    """Wait until the router admits requests and every worker of the plan is attached to it."""
    workers = sum(child.role != "router" for child in plan.children)
    while True:
        if await asyncio.to_thread(_all_attached, plan.children[-1].metrics_url, workers):
            return
        await asyncio.sleep(_PROBE_INTERVAL_S)


def _all_attached(metrics_url: str, workers: int) -> bool:
    if _get(metrics_url.removesuffix("metrics") + "readyz") is None:
        return False
    attached = sum(
        sample.value
        for family in text_string_to_metric_families(_get(metrics_url) or "")
        for sample in family.samples
        if sample.name == "diptych_router_workers" and sample.labels["state"] == "ready"
    )
    return attached >= workers


def _get(url: str) -> str | None:
    """Body of a 200; None for any other answer, or none."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=_PROBE_TIMEOUT_S) as response:
            return str(response.read(), "utf-8") if response.status == 200 else None
    except urllib.error.HTTPError as error:
        error.close()
        return None
    except (OSError, HTTPException):
        return None
