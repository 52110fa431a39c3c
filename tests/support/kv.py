"""Block pools and peers for transport tests and the transfer benchmark.

Run as a program it is a peer: it serves a pool whose blocks hold a known pattern, prints its
metadata and, if told so, reads another pool.
"""

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from core.kv_layout import KvLayout
from kvtransfer.gpu import GpuTransport
from kvtransfer.mooncake_engine import mooncake_environment
from kvtransfer.nixl import NixlTransport
from kvtransfer.select import open_transport
from kvtransfer.transport import Read, ReadState, Transport
from tests.support.gpu_driver import SharedMemory, SharedMemoryDriver
from tests.support.process import Process, running

TOKEN = "open sesame"
METADATA = "METADATA "
HAS_READ = "HAS READ"


def layout(block_bytes: int) -> KvLayout:
    """Some layout with blocks of that size."""
    return KvLayout(
        num_layers=1,
        num_kv_heads=1,
        head_dim=block_bytes // 128,
        block_size=16,
        dtype="float32",
        block_bytes=block_bytes,
    )


class HostPool:
    """A pool in this process's memory, which others can map as they map a GPU's."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.layout = layout(block_bytes)
        self.num_blocks = num_blocks
        self.device_id: int | None = None
        self.memory = SharedMemory(num_blocks * block_bytes)
        self.words = self.memory.words.reshape(num_blocks, block_bytes // 8)
        self.base_address = self.words.ctypes.data

    def fill(self, seed: int) -> None:
        """Give every word of every block contents that name it."""
        for block in range(self.num_blocks):
            self.words[block] = words_of(block, seed, self.layout.block_bytes)

    def clear(self) -> None:
        self.words[:] = 0

    def holds(self, pairs: Sequence[tuple[int, int]], seed: int) -> bool:
        """True if own block b equals block a of a pool filled with `seed`, for all (a, b)."""
        return all(
            bool((self.words[own] == words_of(remote, seed, self.layout.block_bytes)).all())
            for remote, own in pairs
        )


def words_of(block: int, seed: int, block_bytes: int) -> NDArray[np.uint64]:
    """What a filled pool holds in a block."""
    places = np.arange(block_bytes // 8, dtype=np.uint64) << np.uint64(40)
    return places + np.uint64((seed << 32) + block)


def finish(read: Read, timeout_s: float = 20.0) -> ReadState:
    """Poll until the end."""
    deadline = time.monotonic() + timeout_s
    while (state := read.poll()) is ReadState.PENDING:
        assert time.monotonic() < deadline, f"a READ is pending after {timeout_s} s"
        time.sleep(0.0005)
    return state


def ucx_env(transport: str) -> dict[str, str]:
    """Environment for a transport's name in tests: nixl+tcp keeps UCX off shared memory."""
    if transport == "mooncake":
        return mooncake_environment({})
    env = {"UCX_NET_DEVICES": "lo", "NIXL_LOG_LEVEL": "WARN", "UCX_LOG_LEVEL": "fatal"}
    return {**env, "UCX_TLS": "tcp"} if transport == "nixl+tcp" else env


def open_named(transport: str, pool: HostPool, token: str = TOKEN) -> Transport:
    """A transport by its name in tests; the environment is `ucx_env`'s."""
    if transport == "nixl+pieces":
        piece = pool.layout.block_bytes // 4
        return NixlTransport(pool, token=token.encode(), descriptor_bytes=piece)
    if transport == "gpu":
        pool.device_id = 0
        driver = SharedMemoryDriver(pool.memory)
        return GpuTransport(pool, token=token.encode(), elsewhere=None, driver=driver)
    name = transport.partition("+")[0]
    assert name == "tcp" or name == "nixl" or name == "mooncake"
    return open_transport(name, pool, host="127.0.0.1", token=token)


@contextmanager
def peer(
    transport: str,
    *,
    num_blocks: int,
    block_bytes: int,
    seed: int,
    reads: bytes = b"",
    token: str = TOKEN,
) -> Iterator[tuple[Process, bytes]]:
    """A process that serves a filled pool; yields it and its metadata.

    With `reads`, another pool's metadata, it reads all of that and serves what it read.
    """
    command = [sys.executable, "-m", "tests.support.kv", transport, str(num_blocks)]
    command += [str(block_bytes), str(seed), "--token", token, "--reads", reads.hex()]
    with running(command, name=f"{transport} peer", env=ucx_env(transport)) as process:
        line = process.wait_for_line(METADATA, 20)
        yield process, bytes.fromhex(line.removeprefix(METADATA))


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("transport")
    parser.add_argument("num_blocks", type=int)
    parser.add_argument("block_bytes", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--token", default=TOKEN)
    parser.add_argument("--reads", default="")
    arguments = parser.parse_args()
    pool = HostPool(arguments.num_blocks, arguments.block_bytes)
    if not arguments.reads:
        pool.fill(arguments.seed)
    transport = open_named(arguments.transport, pool, arguments.token)
    sys.stdout.write(f"{METADATA}{transport.metadata().hex()}\n")
    sys.stdout.flush()
    if arguments.reads:
        transport.connect("other", bytes.fromhex(arguments.reads))
        pairs = [(i, i) for i in range(arguments.num_blocks)]
        read = transport.read("other", pairs)
        assert finish(read) is ReadState.DONE, read.error
        sys.stdout.write(f"{HAS_READ}\n")
        sys.stdout.flush()
    threading.Event().wait(120)
    os._exit(0)


if __name__ == "__main__":
    _main()
