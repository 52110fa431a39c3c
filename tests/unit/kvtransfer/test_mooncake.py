"""Mooncake's transport where no peer is needed: metadata, runs of blocks, and what can go wrong."""

import ctypes
import importlib
import ipaddress
import socket
import threading
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from kvtransfer import mooncake_channel, select
from kvtransfer.mooncake import MooncakeTransport
from kvtransfer.mooncake_channel import MooncakeChannel, joined_runs
from kvtransfer.mooncake_engine import load_mooncake, mooncake_environment
from kvtransfer.mooncake_listener import shorten_accept
from kvtransfer.mooncake_metadata import NONCE_BYTES, MooncakePool
from kvtransfer.transport import Piece
from tests.support.kv import HostPool

POOL = MooncakePool(
    base_address=1 << 20,
    num_blocks=8,
    block_bytes=4096,
    nonce_address=1 << 16,
    nonce=bytes(range(NONCE_BYTES)),
    host=ipaddress.IPv4Address("192.0.2.7"),
    port=15000,
)


class FakeEngine:
    """Stands for Mooncake's: a READ is done when `done` says so."""

    def __init__(self, nonce: bytes = POOL.nonce) -> None:
        self.nonce = nonce
        self.answers = threading.Event()
        self.answers.set()
        self.posted: list[tuple[int, int, int]] = []
        self.registered: list[int] = []
        self.state = 1
        self.most_pending = 0
        self._pending: set[int] = set()

    def initialize(self, *_: str) -> int:
        return 0

    def get_rpc_port(self) -> int:
        return 1

    def batch_register_memory(self, addresses: list[int], sizes: list[int]) -> int:
        self.registered += addresses
        return 0

    def batch_transfer_async_read(
        self, target: str, own: list[int], peer: list[int], sizes: list[int]
    ) -> int:
        assert self.answers.wait(5)
        if peer == [POOL.nonce_address]:
            ctypes.memmove(own[0], self.nonce, NONCE_BYTES)
            return 1
        self.posted.append((own[0], peer[0], sizes[0]))
        self._pending.add(len(self.posted) + 1)
        self.most_pending = max(self.most_pending, len(self._pending))
        return len(self.posted) + 1

    def transfer_check_status(self, batch: int) -> int:
        if batch == 1:
            return 1
        self._pending.discard(batch)
        return self.state


class FakeApi:
    SUPPORT_CUDA = False

    def __init__(self, engine: FakeEngine) -> None:
        self._engine: FakeEngine | None = engine

    def TransferEngine(self) -> Any:
        engine, self._engine = self._engine, None
        return engine


WHOLE = (Piece(0, 0, POOL.block_bytes),)


def new_channel(
    engine: FakeEngine,
    slots: threading.Semaphore | None = None,
    pieces: tuple[Piece, ...] = WHOLE,
) -> MooncakeChannel:
    slots = slots or threading.Semaphore(1)
    return MooncakeChannel(FakeApi(engine), own=POOL, peer=POOL, pieces=pieces, slots=slots)


def test_metadata_come_back_as_they_were() -> None:
    assert MooncakePool.unpack(POOL.pack()) == POOL
    assert POOL.target == "192.0.2.7:15000"


@pytest.mark.parametrize(
    "bad",
    [
        {"base_address": 0},
        {"num_blocks": 0},
        {"block_bytes": 0},
        {"nonce_address": 0},
        {"port": 0},
        {"base_address": (1 << 63) - 4096},
        {"block_bytes": (1 << 64) - 1},
        {"nonce_address": (1 << 64) - 1},
    ],
)
def test_metadata_that_can_not_be_true_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(TransferError, match="Mooncake"):
        MooncakePool.unpack(replace(POOL, **bad).pack())  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_metadata_of_others_are_refused(data: bytes) -> None:
    with pytest.raises(TransferError, match="Mooncake"):
        MooncakePool.unpack(data)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12, unique=True),
    st.lists(st.integers(0, 9), min_size=12, max_size=12),
)
def test_runs_hold_every_pair_and_are_as_long_as_can_be(own: list[int], peer: list[int]) -> None:
    size, base = POOL.block_bytes, POOL.base_address
    runs = list(joined_runs(POOL, POOL, WHOLE, zip(peer, own, strict=False)))
    pairs = [
        ((run.remote_offset - base) // size + i, (run.own_offset - base) // size + i)
        for run in runs
        for i in range(run.num_bytes // size)
    ]
    assert pairs == list(zip(peer, own, strict=False))
    assert not any(run.joins(after) for run, after in pairwise(runs))


def test_pieces_that_meet_across_blocks_travel_as_one() -> None:
    engine = FakeEngine()
    size, base = POOL.block_bytes, POOL.base_address
    channel = new_channel(engine, pieces=(Piece(0, 64, 8), Piece(size - 8, size - 8, 8)))
    channel.open()
    channel.read([2, 3], [5, 6])
    channel.read([1], [1])
    assert engine.posted == [
        (base + 5 * size + 64, base + 2 * size, 8),
        (base + 6 * size - 8, base + 3 * size - 8, 8),
        (base + 6 * size + 64, base + 3 * size, 8),
        (base + 7 * size - 8, base + 4 * size - 8, 8),
        (base + size + 64, base + size, 8),
        (base + 2 * size - 8, base + 2 * size - 8, 8),
    ]
    other = FakeEngine()
    channel = new_channel(other, pieces=(Piece(0, 0, 8), Piece(size - 8, size - 8, 8)))
    channel.open()
    channel.read([2, 3], [5, 6])
    assert [num_bytes for _, _, num_bytes in other.posted] == [8, 16, 8]


def test_neighbours_travel_as_one_piece() -> None:
    engine = FakeEngine()
    channel = new_channel(engine)
    channel.open()
    channel.read([2, 3, 4, 0], [5, 6, 7, 0])
    assert engine.posted == [
        (POOL.base_address + 5 * 4096, POOL.base_address + 2 * 4096, 3 * 4096),
        (POOL.base_address, POOL.base_address, 4096),
    ]


def test_pieces_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_channel, "_MAX_PIECES_IN_FLIGHT", 2)
    engine = FakeEngine()
    channel = new_channel(engine)
    channel.open()
    channel.read([0, 2, 4, 6], [6, 4, 2, 0])
    assert len(engine.posted) == 4
    assert engine.most_pending == 2


@pytest.mark.parametrize("state", [-1, -2])
def test_failed_piece_fails_the_read(state: int) -> None:
    engine = FakeEngine()
    channel = new_channel(engine)
    channel.open()
    engine.state = state
    with pytest.raises(TransferError, match=r"192\.0\.2\.7:15000"):
        channel.read([0], [0])


def test_interrupt_ends_a_read() -> None:
    engine = FakeEngine()
    engine.state = 0
    channel = new_channel(engine)
    channel.open()
    threading.Timer(0.02, channel.interrupt).start()
    with pytest.raises(TransferError, match="disconnected"):
        channel.read([0], [0])


def test_another_process_on_the_port_is_not_read() -> None:
    engine = FakeEngine(nonce=bytes(NONCE_BYTES))
    with pytest.raises(TransferError, match="Another process"):
        new_channel(engine).open()
    assert POOL.base_address not in engine.registered


def test_engine_of_a_silent_peer_is_given_up_without_the_pool() -> None:
    engine = FakeEngine()
    engine.answers.clear()
    slots = threading.Semaphore(1)
    channel = new_channel(engine, slots)
    threading.Timer(0.02, channel.interrupt).start()
    with pytest.raises(TransferError, match="does not answer"):
        channel.open()
    other = new_channel(FakeEngine(), slots)
    with pytest.raises(TransferError, match="retry"):
        other.open()
    engine.answers.set()
    assert slots.acquire(timeout=5), "the thread ends once the peer has answered"
    assert POOL.base_address not in engine.registered


def test_silent_peer_is_waited_for_a_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_channel, "CONNECT_TIMEOUT_S", 0.02)
    engine = FakeEngine()
    engine.answers.clear()
    with pytest.raises(TransferError, match="does not answer"):
        new_channel(engine).open()
    engine.answers.set()


def test_missing_package_is_named_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(TransferError, match=r"diptych\[mooncake\].*libibverbs1"):
        select.open_transport("mooncake", HostPool(2, 4096), host="127.0.0.1", token="")


def test_ipv6_is_refused_with_a_way_out() -> None:
    with pytest.raises(TransferError, match="IPv4"):
        select.open_transport("mooncake", HostPool(2, 4096), host="::1", token="")


def device_pool() -> HostPool:
    pool = HostPool(2, 4096)
    pool.device_id = 0
    return pool


def test_device_memory_needs_the_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.mooncake.load_mooncake", lambda: FakeApi(FakeEngine()))
    with pytest.raises(TransferError, match="mooncake-transfer-engine"):
        MooncakeTransport(device_pool(), host="127.0.0.1", token=b"")


def test_accept_looks_up_soon() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"\x1e" + bytes(15))
        woken = threading.Event()

        def accept() -> None:
            listener.accept()[0].close()
            try:
                listener.accept()
            except BlockingIOError:
                woken.set()

        thread = threading.Thread(target=accept)
        thread.start()
        shorten_accept(listener.getsockname()[1])
        assert woken.wait(5), "the timeout was 30 s"
        thread.join(5)


def test_port_that_is_not_ours_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    shorten_accept(1)
    assert "was not found" in caplog.text


def test_environment_leaves_what_is_set() -> None:
    assert mooncake_environment({"MC_LOG_LEVEL": "INFO"}) == {"GLOG_minloglevel": "2"}
    assert "MC_LOG_LEVEL" in mooncake_environment({})


@pytest.mark.parametrize("call", ["initialize", "batch_register_memory"])
def test_refusal_of_mooncake_is_an_error(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, call, lambda *_: -1)
    with pytest.raises(TransferError, match="Mooncake"):
        new_channel(FakeEngine()).open()


def test_end_of_an_engine_stops_nobody_for_long() -> None:
    try:
        load_mooncake()
    except TransferError as error:
        pytest.skip(error.message)
    transport = MooncakeTransport(HostPool(2, 4096), host="127.0.0.1", token=b"")
    start = time.monotonic()
    transport.close()
    assert time.monotonic() - start < 0.5, "0.02 s with the shorter accept(), 1 s without"
