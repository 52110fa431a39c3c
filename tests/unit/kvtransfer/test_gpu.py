"""Transport between GPUs where no GPU is needed: ways to a peer, and how pieces become copies."""

import logging
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from core.kv_layout import KvLayout
from kvtransfer import gpu
from kvtransfer.gpu import GpuTransport
from kvtransfer.gpu_rows import UNIT_BYTES, Rows, as_rows
from kvtransfer.head_slices import plan_slices
from kvtransfer.nixl import NixlTransport
from kvtransfer.transport import BlockPieces, Piece, ReadState
from tests.support.gpu_driver import SharedMemoryDriver
from tests.support.kv import TOKEN, HostPool, finish

BLOCK = 1 << 12


def pieces_of(rows: Sequence[Rows]) -> list[Piece]:
    return [
        Piece(
            each.first.remote_offset + i * each.remote_pitch,
            each.first.own_offset + i * each.own_pitch,
            each.first.num_bytes,
        )
        for each in rows
        for i in range(each.count)
    ]


@st.composite
def cut(draw: st.DrawFn) -> list[Piece]:
    """Pieces in any places, of which some are neighbours at whole units, some at parts of one."""
    unit = draw(st.sampled_from([UNIT_BYTES, UNIT_BYTES, UNIT_BYTES // 2]))
    offsets, sizes = st.integers(0, 9), st.integers(1, 3)
    pieces = draw(st.lists(st.builds(Piece, offsets, offsets, sizes), max_size=12))
    return [Piece(*(number * unit for number in piece)) for piece in pieces]


@given(cut())
def test_rows_are_the_same_pieces_in_the_same_order(pieces: list[Piece]) -> None:
    rows = as_rows(pieces)
    assert pieces_of(rows) == pieces
    for each in rows:
        if each.count > 1:
            pitches = (each.remote_pitch, each.own_pitch)
            assert min(pitches) >= each.first.num_bytes, "rows of one copy must not overlap"
            assert not any(number % UNIT_BYTES for number in (*each.first, *pitches))


@pytest.mark.parametrize(("source_size", "own_size"), [(1, 2), (2, 1), (4, 2), (1, 8)])
def test_the_heads_of_a_rank_are_one_rectangle(source_size: int, own_size: int) -> None:
    layout = KvLayout(
        num_layers=4, num_kv_heads=8, head_dim=16, block_size=16, dtype="float32", block_bytes=65536
    )
    for part in plan_slices(
        layout, layout, source_size=source_size, own_size=own_size, own_rank=own_size - 1
    ):
        assert part.pieces is not None
        (rows,) = as_rows(part.pieces.pieces)
        assert rows.count == 8, "K and V of each layer"


def test_the_rows_of_more_blocks_than_one_launch_takes_all_arrive() -> None:
    num_blocks, rows, width = 1100, 6, 48
    source = HostPool(num_blocks, BLOCK)
    source.fill(4)
    target = HostPool(num_blocks, BLOCK)
    server, reader = opened(source, nixl=False), opened(target, nixl=False)
    pieces = tuple(Piece(256 * row + 16, 512 * row + 32, width) for row in range(rows))
    reader.connect("p", server.metadata(), BlockPieces(BLOCK, pieces))
    assert finish(reader.read("p", [(i, num_blocks - 1 - i) for i in range(num_blocks)])) is (
        ReadState.DONE
    )
    expected = np.zeros_like(target.words)
    for remote, own, size in pieces:
        words = source.words[::-1, remote // 8 : (remote + size) // 8]
        expected[:, own // 8 : (own + size) // 8] = words
    assert (target.words == expected).all()
    reader.close()
    server.close()


def test_the_kernel_of_rows_becomes_machine_code(tmp_path: Path) -> None:
    """What the driver will do on a GPU; the code is not run here."""
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="has NVIDIA's assembler")
    assembler = Path(nvidia.__path__[0]) / "bin" / "ptxas"
    source = files("kvtransfer").joinpath("gpu_rows.ptx")
    for target in ("sm_80", "sm_90"):
        command = [assembler, "-v", f"-arch={target}", str(source), "-o", tmp_path / target]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "0 bytes spill stores" in said


class BrokenDriver(SharedMemoryDriver):
    def open_handle(self, handle: bytes) -> int:
        raise TransferError("cuIpcOpenMemHandle_v2 gave CUDA error 201.")


def host_nixl(pool: HostPool) -> NixlTransport:
    """NIXL over the same memory, which is a CPU's after all."""
    pool.device_id = None
    nixl = NixlTransport(pool, token=TOKEN.encode())
    pool.device_id = 0
    return nixl


def opened(pool: HostPool, *, nixl: bool, broken: bool = False) -> GpuTransport:
    elsewhere = host_nixl(pool) if nixl else None
    pool.device_id = 0
    driver = (BrokenDriver if broken else SharedMemoryDriver)(pool.memory)
    return GpuTransport(pool, token=TOKEN.encode(), elsewhere=elsewhere, driver=driver)


def filled() -> HostPool:
    pool = HostPool(8, BLOCK)
    pool.fill(3)
    return pool


def test_what_can_not_be_mapped_is_read_by_nixl(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    target = HostPool(8, BLOCK)
    source = filled()
    server, reader = opened(source, nixl=True), opened(target, nixl=True, broken=True)
    with caplog.at_level(logging.WARNING):
        reader.connect("p", server.metadata())
        assert finish(reader.read("p", [(5, 1)])) is ReadState.DONE
    assert "CUDA error 201" in caplog.text and "NIXL reads it" in caplog.text
    assert target.holds([(5, 1)], 3)
    reader.close()
    server.close()


def test_a_peer_of_another_host_is_read_by_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    source, target = filled(), HostPool(8, BLOCK)
    server = opened(source, nixl=True)
    lonely = opened(HostPool(8, BLOCK), nixl=False)
    reader = opened(target, nixl=True, broken=True)
    monkeypatch.setattr(gpu, "this_host", lambda: b"another host----")
    with pytest.raises(TransferError, match=r"another host.*diptych\[nixl-cu13\]"):
        lonely.connect("p", server.metadata())
    with pytest.raises(TransferError, match="another host"):
        reader.connect("p", lonely.metadata())
    reader.connect("p", server.metadata())
    assert finish(reader.read("p", [(2, 7)])) is ReadState.DONE
    assert target.holds([(2, 7)], 3)
    for transport in (reader, lonely, server):
        transport.close()


def test_without_any_way_left_the_read_fails_and_says_why() -> None:
    server = opened(filled(), nixl=False)
    reader = opened(HostPool(8, BLOCK), nixl=False, broken=True)
    reader.connect("p", server.metadata())
    try:
        read = reader.read("p", [(0, 0)])
        assert finish(read) is ReadState.FAILED
        error = read.error
    except TransferError as refused:
        error = refused.message
    assert "CUDA error 201" in error
    reader.close()
    server.close()


def test_memory_that_can_not_be_shared_is_left_to_nixl_or_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unshared(SharedMemoryDriver):
        def export(self, device_id: int, address: int) -> tuple[bytes, int]:
            raise TransferError("cuIpcGetMemHandle gave CUDA error 1.")

    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    source, target = filled(), HostPool(8, BLOCK)
    server = GpuTransport(
        source,
        token=TOKEN.encode(),
        elsewhere=host_nixl(source),
        driver=Unshared(source.memory),
    )
    assert "can't map the KV pool" in caplog.text
    reader = opened(target, nixl=True)
    reader.connect("p", server.metadata())
    assert finish(reader.read("p", [(1, 1)])) is ReadState.DONE
    assert target.holds([(1, 1)], 3)
    with pytest.raises(TransferError, match="cuIpcGetMemHandle"):
        GpuTransport(source, token=b"", elsewhere=None, driver=Unshared(source.memory))
    reader.close()
    server.close()
