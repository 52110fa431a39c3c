"""What processes a cluster consists of: ports, commands and environment, before any starts.

Pure but for the port probing. Worker ports come from below the range that the kernel gives to
outgoing connections, so that a worker that ended finds its port free when it is started again.
"""

import random
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.errors import ConfigError
from diptych.cluster.gpus import worker_gpus
from diptych.cluster.settings import ServeSettings, worker_options
from engine.threads import available_cores

Role = Literal["router", "prefill", "decode"]
LOOPBACK = "127.0.0.1"
_PORTS = range(20_000, 30_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One process: how to start it, and where it can be looked at."""

    name: str
    role: Role
    command: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the launcher's environment; holds the token."""
    metrics_url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """All processes, in the order in which they start."""

    children: tuple[ChildSpec, ...]
    """The router is the last."""
    model_name: str
    base_url: str
    """Of the HTTP endpoint."""
    console: bool
    """The router serves its page."""


def plan_cluster(
    settings: ServeSettings,
    *,
    model_path: Path,
    token: str,
    ports: Sequence[int],
    parent_pid: int,
    num_gpus: int,
) -> ClusterPlan:
    """Lay out the processes.

    Args:
        settings: what the user asked for; `port` must not be 0.
        model_path: the resolved model, the same for all.
        token: shared secret of this cluster.
        ports: free loopback ports, `num_ports` of them.
        parent_pid: the launcher's, whose end ends every child.
        num_gpus: that workers can use.

    Raises:
        ConfigError: the settings ask for more GPUs than there are.
    """
    model_name = settings.served_model_name or Path(settings.model).name
    # The file, and not a level on the way to it, decides what is shown: JSON keeps levels readable.
    common = (f"--model={model_path}", f"--served-model-name={model_name}", "--log-format=json")
    level = f"--log-level={settings.log_level}"
    passed_on = list(worker_options(settings))
    if not any(option.startswith("--num-threads=") for option in passed_on):
        threads = threads_per_worker(available_cores(), settings.prefill + settings.decode)
        passed_on.append(f"--num-threads={threads}")
    places = iter(worker_gpus(settings, settings.prefill + settings.decode, num_gpus))
    unused = iter(ports)

    def command(role: Role, *options: str) -> tuple[str, ...]:
        child = (sys.executable, "-m", "diptych.cluster.child", str(parent_pid), role)
        return (*child, *common, level, *options)

    def environment(role: Role) -> dict[str, str]:
        return {f"DIPTYCH_{role.upper()}_AUTH_TOKEN": token, "PYTHONUNBUFFERED": "1"}

    workers: list[ChildSpec] = []
    addresses: dict[Role, list[str]] = {"prefill": [], "decode": []}
    roles: list[tuple[Role, int]] = [("prefill", settings.prefill), ("decode", settings.decode)]
    for role, count in roles:
        for index in range(count):
            port, metrics_port = next(unused), next(unused)
            name = f"{role}-{index}"
            place = (f"--host={LOOPBACK}", f"--port={port}", f"--metrics-port={metrics_port}")
            gpu = next(places)
            workers.append(
                ChildSpec(
                    name=name,
                    role=role,
                    command=command(role, f"--worker-id={name}", *place, *passed_on, *gpu),
                    env=environment(role),
                    metrics_url=f"http://{LOOPBACK}:{metrics_port}/metrics",
                )
            )
            addresses[role].append(f"{LOOPBACK}:{port}")
    scheme = "https" if settings.http_tls_cert else "http"
    base_url = f"{scheme}://{_reachable(settings.host)}:{settings.port}"
    metrics_port = next(unused)
    router = ChildSpec(
        name="router",
        role="router",
        command=command(
            "router",
            f"--host={settings.host}",
            f"--port={settings.port}",
            f"--metrics-host={LOOPBACK}",
            f"--metrics-port={metrics_port}",
            *_http_options(settings),
            "--console" if settings.console else "--no-console",
            *(f"--{role}={','.join(found)}" for role, found in addresses.items() if found),
        ),
        env=environment("router"),
        metrics_url=f"http://{LOOPBACK}:{metrics_port}/metrics",
    )
    return ClusterPlan(
        children=(*workers, router),
        model_name=model_name,
        base_url=base_url,
        console=settings.console,
    )


def num_ports(settings: ServeSettings) -> int:
    """Ports that a cluster needs besides its HTTP port: two for each worker, one for the router."""
    return 2 * (settings.prefill + settings.decode) + 1


def _http_options(settings: ServeSettings) -> list[str]:
    names = ("api_keys", "http_tls_cert", "http_tls_key")
    given = {name.replace("_", "-"): getattr(settings, name) for name in names}
    return [f"--{name}={value}" for name, value in given.items() if value]


def threads_per_worker(cores: int, num_workers: int) -> int:
    """Compute threads that suit workers which share the machine.

    One prefill and one decode worker mostly take turns, so each gets every core. More of them are
    busy at once, and then threads that outnumber the cores only get in each other's way
    (`benchmarks/cpu_kernels.py spin` with --threads 1 and 2, its column for two processes).
    """
    return max(1, min(cores, 2 * cores // max(1, num_workers)))


def _reachable(host: str) -> str:
    """An address that a client on this machine can use for a server that listens on `host`."""
    host = {"0.0.0.0": LOOPBACK, "::": "::1", "": LOOPBACK}.get(host, host)
    return f"[{host}]" if ":" in host else host


def free_ports(count: int) -> list[int]:
    """Loopback ports that nothing listens on, all different.

    Raises:
        ConfigError: there are not that many.
    """
    with ExitStack() as held:
        found: list[int] = []
        for port in random.sample(_PORTS, len(_PORTS)):
            if len(found) == count:
                return found
            probe = held.enter_context(socket.socket())
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            found.append(port)
    raise ConfigError(f"There are no {count} free ports in {_PORTS.start}-{_PORTS.stop - 1}.")


def settle_port(host: str, port: int) -> int:
    """The port itself if it can be listened on; a free one for 0.

    Raises:
        ConfigError: it is taken, or `host` is not an address of this machine.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"Can't listen on {host}:{port}: {error.strerror}. "
            f"Stop what uses the port, or choose another one with --port."
        ) from None
