r"""What the router costs: CPU per streamed token, latency added to each, memory per stream.

    python -m benchmarks.router_stream --save
    python -m benchmarks.router_stream --peer "vllm-router 0.1.17=VENV/bin/vllm-router" \
        --peer "sglang-router 0.3.2=VENV/bin/sglang-router launch" --save

Real processes: workers without an engine (benchmarks.router_worker), a router, and one client that
reads raw bytes (benchmarks.router_client). What is measured has one core to itself, as far as other
work on the machine leaves it alone; client and workers have the others. Rounds of all servers
alternate.

- Throughput: as many tokens as the server can stream, one at a time per stream, over the server's
  own CPU time, which also holds on a machine that is busy with other things. Beside it a bare ASGI
  app under the same HTTP server that writes the same chunks, and gives way after each.
- Latency: from the moment that a worker makes a token until the client has it. The bare app does
  the same without a router between; the difference is what a router adds. Workers step apart from
  each other, or one of them makes a token of every stream at the same moment.
- Memory: resident memory of the router with many slow streams open, less what it had before.

A peer is any router that is started as `PROGRAM --host H --port P --worker-urls URL`. It is put in
front of the bare app, which speaks HTTP: the peer passes on the bytes of an answer that is complete
already. Our router gets token ids over gRPC, puts the tokens of a request in order, keeps them for
fail-over, turns them into text, watches for stops, counts, and writes the answer itself. What is
the same: the client, the number of streams and tokens, the bytes that the client reads.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from benchmarks.router_client import Streams
from benchmarks.router_processes import Server, keep_a_core_free, peer_router, router, workers
from benchmarks.router_worker import write_model

DEADLINE_S = 300.0
PACE = 50.0
"""Tokens a second and stream whose latency is measured."""
SETTLE_S = 2.0
"""Of each latency run that does not count."""
LOOK_S = 0.004
"""Between two looks at the streams of a throughput run: no server pays for waking the client."""
IDLE_RATE = 1.0
WARM_STREAMS = 32


def add_quantiles(
    report: Report, name: str, seconds: Sequence[float], goals: Sequence[str]
) -> None:
    """p50 and p99 in milliseconds."""
    for part, goal in zip((50, 99), goals, strict=True):
        value = float(np.percentile(seconds, part)) * 1e3
        report.add(f"{name}, p{part}", value, "ms", goal=goal)


def stream_all(server: Server, count: int, tokens: int) -> tuple[float, int]:
    """Read `count` streams to their end; CPU seconds of the server, and events that had text."""
    began = server.cpu_s
    streams = Streams(server.port, count, tokens)
    if not streams.read(time.monotonic() + DEADLINE_S, LOOK_S):
        raise RuntimeError(f"streams did not end within {DEADLINE_S:g} s")
    spent = server.cpu_s - began
    streams.close()
    counts = [each.tokens_and_events() for each in streams.received]
    if any(num_tokens != tokens for num_tokens, _ in counts):
        raise RuntimeError("a stream has not the tokens that it was to have")
    return spent, sum(num_events for _, num_events in counts)


def throughput(report: Report, servers: dict[str, Server], given: argparse.Namespace) -> None:
    """Tokens per second of the server's CPU time; ratios within a round."""
    rates: dict[str, list[float]] = {name: [] for name in servers}
    pieces: dict[str, list[float]] = {name: [] for name in servers}
    total = given.streams * given.tokens
    for server in servers.values():
        stream_all(server, given.streams, given.tokens // 10)
    for _ in range(given.rounds):
        for name, server in servers.items():
            spent, events = stream_all(server, given.streams, given.tokens)
            rates[name].append(total / spent)
            pieces[name].append(events / total)
    for name in servers:
        add = partial(report.add, samples=rates[name])
        add(f"{name}: tokens per CPU second", statistics.median(rates[name]), "tok/s")
        report.add(f"{name}: events per token", statistics.median(pieces[name]), "")
        if name != BARE:
            shares = [a / b for a, b in zip(rates[name], rates[BARE], strict=True)]
            goal = ">= 0.5" if name == OURS else ""
            value = statistics.median(shares)
            report.add(f"{name} / {BARE}", value, "x", samples=shares, goal=goal)


def latencies(server: Server, count: int, seconds: float) -> list[float]:
    """Of each token of `count` streams, from the worker to the client."""
    streams = Streams(server.port, count, 1 << 17)
    try:
        streams.read(time.monotonic() + SETTLE_S)
        streams.forget()
        streams.read(time.monotonic() + seconds)
    finally:
        streams.close()
    return [each for received in streams.received for each in received.latencies_s()]


def idle_memory(server: Server, count: int) -> tuple[int, int]:
    """Resident bytes before and with `count` streams open that have had a few tokens."""
    stream_all(server, WARM_STREAMS, 2)
    before = server.resident_bytes
    streams = Streams(server.port, count, 1 << 17)
    try:
        streams.read(time.monotonic() + SETTLE_S + 3 / IDLE_RATE)
        if not all(each.tokens_and_events()[0] for each in streams.received):
            raise RuntimeError("a stream had no token yet")
        return before, server.resident_bytes
    finally:
        streams.close()


OURS, BARE = "router", "bare app"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of the router per token and per stream.")
    parser.add_argument("--streams", type=int, default=256, help="at once, for throughput")
    parser.add_argument("--tokens", type=int, default=1000, help="of each of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--paced", type=int, default=256, help="streams whose latency is measured")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a latency run")
    parser.add_argument("--idle", type=int, default=1000, help="streams whose memory is measured")
    parser.add_argument("--peer", action="append", default=[], help="NAME=PROGRAM, several times")
    parser.add_argument("--only", choices=("throughput", "latency", "memory"))
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    peers = dict(each.split("=", 1) for each in given.peer)
    report = Report("router-stream", vars(given) | {"peer": list(peers)})
    keep_a_core_free()
    gc.disable()  # a pause of the client would count as latency
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        if given.only in (None, "throughput"):
            measure_throughput(report, Path(folder), peers, given)
        if given.only in (None, "latency"):
            measure_latency(report, Path(folder), peers, given)
        if given.only in (None, "memory"):
            measure_memory(report, Path(folder), given)
    if given.save:
        print(report.save())


def measure_throughput(
    report: Report, model: Path, peers: dict[str, str], given: argparse.Namespace
) -> None:
    """All servers at once; those that nobody reads from do nothing."""
    with ExitStack() as stack:
        start = stack.enter_context
        (bare,) = start(workers("http", measured=True))
        behind = start(workers("grpc", together=given.streams))
        servers = {OURS: start(router(model, behind)), BARE: bare}
        servers |= {name: start(peer_router(program, bare)) for name, program in peers.items()}
        throughput(report, servers, given)


def measure_latency(
    report: Report, model: Path, peers: dict[str, str], given: argparse.Namespace
) -> None:
    """One set of servers after the other, so that they do not get into each other's way."""
    label = f"{given.paced} streams of {PACE:g} tokens/s"

    def add(name: str, server: Server, goals: Sequence[str] = ("", "")) -> None:
        add_quantiles(
            report, f"{label}, {name}", latencies(server, given.paced, given.seconds), goals
        )

    for count, how in ((8, "8 workers"), (1, "1 worker")):
        with workers("grpc", count=count, rate=PACE) as behind, router(model, behind) as server:
            add(f"{OURS}, {how}", server, ("<= 2", "<= 10"))
    with workers("http", rate=PACE) as (bare,):
        add(BARE, bare)
        for name, program in peers.items():
            with peer_router(program, bare) as peer:
                add(name, peer)


def measure_memory(report: Report, model: Path, given: argparse.Namespace) -> None:
    """One token a second and stream."""
    with workers("grpc", rate=IDLE_RATE) as behind, router(model, behind) as server:
        before, after = idle_memory(server, given.idle)
    report.add("resident before", before / 1e6, "MB")
    report.add(f"resident with {given.idle} streams", after / 1e6, "MB")
    report.add("memory per stream", (after - before) / given.idle / 1e3, "kB", goal="<= 64")


if __name__ == "__main__":
    main()
