"""Prometheus metrics: shared buckets, registries, and the HTTP port that a worker shows them on.

Each package declares its metrics once, on a registry that its process owns (never the global one);
names start with `diptych_`. The router shows the same three paths on its own HTTP port. A counter
whose label values are known shows them all from the start, at 0: without a 0 before it, the first
event of a kind is no increase, and no alert sees it.
"""

import asyncio
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from email.utils import formatdate
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

TTFT_BUCKETS_S = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 20, 40, 80,
)  # fmt: skip
"""Time to first token, and other waits of a whole request's part."""
ITL_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8,
    2, 5,
)  # fmt: skip
"""Gap between two tokens of one request, and their mean."""
STAGE_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5,
    10, 30, 120,
)  # fmt: skip
"""A stage of a request: some take microseconds, others as long as the request."""
STEP_BUCKETS_S = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 4, 10,
)  # fmt: skip
"""One engine step."""
TRANSFER_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10,
)  # fmt: skip
"""Moving the KV of one request."""
REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480)
"""A whole request."""
REQUEST_TOKENS_BUCKETS = (
    1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072,
)  # fmt: skip
"""Tokens of one sequence."""

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_REQUEST_TIMEOUT_S = 5.0
_MAX_REQUEST_BYTES = 8 << 10
_MAX_CONNECTIONS = 16


class ProcessRegistry(CollectorRegistry):
    """Registry of one process. Leaves out when each series was created, which nobody asks."""

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        for metric in super().collect():
            metric.samples = [
                sample for sample in metric.samples if not sample.name.endswith("_created")
            ]
            yield metric


def show_build(registry: CollectorRegistry, component: str, version: str) -> None:
    """Say what runs here; `component` is router, prefill or decode."""
    Info("diptych_build", "What runs here: component, and its version.", registry=registry).info(
        {"component": component, "version": version, "python": platform.python_version()}
    )


def start_at_zero(counter: Counter, *values: Iterable[str]) -> None:
    """Show a series for every combination of label values, given in the order of the labels."""
    for combination in product(*values):
        counter.labels(*combination)


def exposition(
    registry: CollectorRegistry,
    extra: Iterable[bytes] = (),
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """Text exposition of a registry, followed by what other processes of this worker exposed.

    Args:
        registry: this process's metrics.
        extra: expositions as text; their metric names must not be in `registry`.
        labels: put on every series; no series may have one of that name.
    """
    parts = [generate_latest(registry), *extra]
    text = b"".join(part if part.endswith(b"\n") or not part else part + b"\n" for part in parts)
    if not labels:
        return text
    added = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()).encode()
    return b"".join(_with_labels(line, added) for line in text.splitlines(keepends=True))


def _with_labels(line: bytes, added: bytes) -> bytes:
    if line.startswith(b"#") or not line.strip():
        return line
    name, _, rest = line.partition(b" ")
    own_name, brace, _ = name.partition(b"{")
    if brace:
        return own_name + b"{" + added + b"," + line[len(own_name) + 1 :]
    return name + b"{" + added + b"} " + rest


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


async def serve_metrics(
    registry: CollectorRegistry,
    host: str,
    port: int,
    *,
    extra: Callable[[], Iterable[bytes]] = tuple,
    labels: Mapping[str, str] | None = None,
    healthy: Callable[[], bool] = lambda: True,
    ready: Callable[[], bool] = lambda: True,
) -> asyncio.Server:
    """Answer GET /metrics, /healthz and /readyz over HTTP until the server is closed.

    Args:
        registry: this process's metrics.
        host: address to listen on.
        port: port; 0 takes a free one (`server.sockets[0].getsockname()[1]`).
        extra: expositions of other processes of this worker, asked at each scrape.
        labels: put on every series.
        healthy: /healthz is 200 while it is true, else 503.
        ready: /readyz is 200 while it is true, else 503.

    Raises:
        OSError: the port is taken, or `host` is not an address of this host.
    """

    def respond(path: str) -> tuple[int, str, bytes]:
        if path == "/metrics":
            return 200, CONTENT_TYPE, exposition(registry, extra(), labels)
        if path in ("/healthz", "/readyz"):
            holds = healthy() if path == "/healthz" else ready()
            return (200, "text/plain", b"ok\n") if holds else (503, "text/plain", b"no\n")
        return 404, "text/plain", b"There are /metrics, /healthz and /readyz.\n"

    free = asyncio.Semaphore(_MAX_CONNECTIONS)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S), free:
                head = await reader.readuntil(b"\r\n\r\n")
                method, target, *_ = head.decode("latin-1").split("\r\n", 1)[0].split(" ")
                status, kind, body = respond(target.partition("?")[0])
                if method not in ("GET", "HEAD"):
                    status, kind, body = 405, "text/plain", b"Only GET.\n"
                writer.write(
                    f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
                    f"Date: {formatdate(usegmt=True)}\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                    + (b"" if method == "HEAD" else body)
                )
                await writer.drain()
        except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # A scraper that stalls, goes away or speaks no HTTP concerns nobody else.
        finally:
            writer.close()

    try:
        return await asyncio.start_server(answer, host, port, limit=_MAX_REQUEST_BYTES)
    except OSError as error:
        raise OSError(
            error.errno, f"Can't show metrics on {host}:{port}: {error.strerror}"
        ) from None


_REASONS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}
