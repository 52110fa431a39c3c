"""How fast each transport moves KV blocks between two processes, beside memory and sockets.

    python -m benchmarks.kv_transfer [--mebibytes 64] [--repetitions 9]

Limits first: one thread's copy of the same bytes, and a bare socket on loopback. Blocks are those
of SmolLM2-135M in float32 and of Llama-3-8B in bfloat16, 16 tokens each. "Half the heads" is what a
rank of two reads from a worker of one: for each layer, a run of bytes of K and one of V. Every
figure is the median of the raw samples, which the JSON file keeps. READs are polled every 0.5 ms,
as decode's loop does.
"""

import argparse
import os
import socket
import threading
import time
from collections.abc import Callable

import numpy as np

from benchmarks.report import Report, median
from kvtransfer.transport import BlockPieces, Piece, ReadState
from tests.support.kv import HostPool, finish, open_named, peer, ucx_env

BLOCK_BYTES = {"SmolLM2-135M": 737_280, "Llama-3-8B": 2 << 20}
LAYERS = {"SmolLM2-135M": 30, "Llama-3-8B": 32}
TRANSPORTS = ("tcp", "nixl", "nixl+tcp", "mooncake")


def sample(call: Callable[[], None], num_bytes: int, repetitions: int) -> list[float]:
    """GB/s of each repetition, after one warm-up."""
    call()
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        rates.append(num_bytes / (time.perf_counter() - start) / 1e9)
    return rates


def memcpy_rates(num_bytes: int, repetitions: int) -> list[float]:
    """One thread copies from one array to another."""
    source = np.ones(num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    return sample(lambda: np.copyto(target, source), num_bytes, repetitions)


def socket_rates(num_bytes: int, repetitions: int) -> list[float]:
    """A child process sends, this one receives, over TCP on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        sock = socket.create_connection(listener.getsockname(), timeout=60)
        data = bytes(num_bytes)
        while sock.recv(1):
            sock.sendall(data)
        os._exit(0)
    sock, _ = listener.accept()
    target = memoryview(bytearray(num_bytes))

    def pull() -> None:
        sock.sendall(b"x")
        received = 0
        while received < num_bytes:
            received += sock.recv_into(target[received:])

    rates = sample(pull, num_bytes, repetitions)
    sock.close()
    listener.close()
    os.waitpid(child, 0)
    return rates


def transport_rates(
    name: str, block_bytes: int, num_blocks: int, repetitions: int
) -> dict[str, list[float]]:
    """Rates of whole-pool READs, in order and scattered, and milliseconds of one-block READs."""
    os.environ.update(ucx_env(name))
    pool = HostPool(num_blocks, block_bytes)
    transport = open_named(name, pool)
    order = np.random.default_rng(0).permutation(num_blocks).tolist()
    in_order = [(i, i) for i in range(num_blocks)]
    scattered = list(zip(order, order[::-1], strict=True))
    with peer(name, num_blocks=num_blocks, block_bytes=block_bytes, seed=1) as (_, metadata):
        transport.connect("p", metadata)

        def read(pairs: list[tuple[int, int]]) -> None:
            assert finish(transport.read("p", pairs)) is ReadState.DONE

        num_bytes = num_blocks * block_bytes
        rates = {
            "in order": sample(lambda: read(in_order), num_bytes, repetitions),
            "scattered": sample(lambda: read(scattered), num_bytes, repetitions),
        }
        one = sample(lambda: read([(0, 0)]), block_bytes, repetitions * 4)
        rates["one block ms"] = [block_bytes / rate / 1e6 for rate in one]
        assert pool.holds(scattered[:1], 1)
        transport.close()
    if "UCX_TLS" in os.environ:
        del os.environ["UCX_TLS"]
    return rates


def half_heads_rates(
    name: str, block_bytes: int, num_layers: int, num_blocks: int, repetitions: int
) -> list[float]:
    """Rates of READs of half of every block, in order."""
    os.environ.update(ucx_env(name))
    run = block_bytes // (4 * num_layers)
    pieces = tuple(Piece((2 * i + 1) * run, i * run, run) for i in range(2 * num_layers))
    transport = open_named(name, HostPool(num_blocks, block_bytes // 2))
    pairs = [(i, i) for i in range(num_blocks)]
    with peer(name, num_blocks=num_blocks, block_bytes=block_bytes, seed=1) as (_, metadata):
        transport.connect("p", metadata, BlockPieces(block_bytes, pieces))

        def read() -> None:
            assert finish(transport.read("p", pairs)) is ReadState.DONE

        rates = sample(read, num_blocks * block_bytes // 2, repetitions)
        transport.close()
    if "UCX_TLS" in os.environ:
        del os.environ["UCX_TLS"]
    return rates


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    num_bytes, repetitions = arguments.mebibytes << 20, arguments.repetitions
    report = Report("kv-transfer", vars(arguments))
    memcpy = memcpy_rates(num_bytes, repetitions)
    report.add("copy by one thread", median(memcpy), "GB/s", samples=memcpy)
    sockets = socket_rates(num_bytes, repetitions)
    report.add("bare socket on loopback", median(sockets), "GB/s", samples=sockets)
    for model, block_bytes in BLOCK_BYTES.items():
        for name in TRANSPORTS:
            rates = transport_rates(name, block_bytes, num_bytes // block_bytes, repetitions)
            for what in ("in order", "scattered"):
                goal = "> 1" if name == "tcp" else ""
                title = f"{name}, {model} blocks, {what}"
                report.add(title, median(rates[what]), "GB/s", samples=rates[what], goal=goal)
            num_blocks = num_bytes // block_bytes
            half = half_heads_rates(name, block_bytes, LAYERS[model], num_blocks, repetitions)
            report.add(
                f"{name}, {model} blocks, half the heads", median(half), "GB/s", samples=half
            )
            one = rates["one block ms"]
            report.add(f"{name}, {model}, one block", median(one), "ms", samples=one)
            assert threading.active_count() == 1, "a transport left a thread behind"
    print(report.save())


if __name__ == "__main__":
    main()
