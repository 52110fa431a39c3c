"""What a stream that is open costs a router process in memory."""

import time
from pathlib import Path

import pytest

from benchmarks.router_client import Streams
from benchmarks.router_processes import Server, router, workers
from benchmarks.router_worker import write_model

STREAMS = 300
MOST_BYTES = 64 << 10
"""Of memory per open stream, sockets in the kernel aside; about half of it is used."""
DEADLINE_S = 30.0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_model(tmp_path)
    return tmp_path


def open_streams(server: Server, count: int) -> Streams:
    """Open streams, each of which has had its first token."""
    streams = Streams(server.port, count, 10_000)
    deadline = time.monotonic() + DEADLINE_S
    while not all(b'"text"' in received.data for received in streams.received):
        assert time.monotonic() < deadline, "streams have no token"
        assert not streams.read(time.monotonic() + 0.1), "streams ended"
    return streams


def test_memory_of_an_open_stream_is_bounded(model: Path) -> None:
    with workers("grpc", rate=2.0) as behind, router(model, behind) as server:
        open_streams(server, 50).close()
        before = server.resident_bytes
        streams = open_streams(server, STREAMS)
        grown = server.resident_bytes - before
        streams.close()
    assert grown / STREAMS < MOST_BYTES
