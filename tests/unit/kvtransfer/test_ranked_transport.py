"""Ranks that move blocks together: every head arrives, and nobody writes after a READ has ended."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from core.errors import TransferError, WorkerLostError
from kvtransfer.tcp_frames import TcpMetadata
from kvtransfer.transport import ReadState
from kvtransfer.worker_transport import JoinedRead
from tests.support.kv import finish
from tests.support.kv_ranks import (
    BLOCK_SIZE,
    HEAD_DIM,
    LET_GO_S,
    RankedWorker,
    RankPool,
    fits,
    ranked_worker,
    share,
    whole_layout,
)

NUM_BLOCKS = 6
PAIRS = [(4, 0), (5, 1), (1, 3)]
SIZES = [
    (heads, source, own)
    for heads, source, own in product((1, 2, 4), (1, 2, 4), (1, 2, 4))
    if fits(heads, source) and fits(heads, own)
]


def random_blocks(num_layers: int, num_kv_heads: int) -> "np.ndarray[tuple[int, ...], np.dtype]":
    shape = (NUM_BLOCKS, num_layers, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM)
    return np.random.default_rng(1).standard_normal(shape).astype("float16")


@pytest.mark.parametrize(("heads", "source_size", "own_size"), SIZES)
def test_every_rank_reads_its_own_heads(heads: int, source_size: int, own_size: int) -> None:
    layout, blocks = whole_layout(3, heads), random_blocks(3, heads)
    with (
        ranked_worker(layout, source_size, blocks) as source,
        ranked_worker(layout, own_size, NUM_BLOCKS) as own,
    ):
        metadata = source.transport.rank_metadata
        assert len(metadata) == source_size
        own.transport.connect("p", layout, metadata)
        read = own.transport.read("p", PAIRS)
        assert finish(read) is ReadState.DONE, read.error
        assert read.duration_s > 0
        for rank, pool in enumerate(own.pools):
            expected = np.zeros_like(pool.data)
            expected[[mine for _, mine in PAIRS]] = share(blocks, own_size, rank)[
                [theirs for theirs, _ in PAIRS]
            ]
            assert (pool.data == expected).all()
        own.transport.disconnect("p")
        with pytest.raises(TransferError, match="not connected"):
            own.transport.read("p", PAIRS)
        own.transport.connect("p2", layout, metadata)
        assert finish(own.transport.read("p2", [(0, 5)])) is ReadState.DONE


LAYOUT = whole_layout(2, 4)


def test_ranks_of_other_hosts_are_read_there() -> None:
    blocks = random_blocks(2, 4)
    with (
        ranked_worker(LAYOUT, 2, blocks, host_of_others="127.0.0.2") as source,
        ranked_worker(LAYOUT, 1, NUM_BLOCKS) as own,
    ):
        metadata = source.transport.rank_metadata
        assert [TcpMetadata.unpack(rank).host for rank in metadata] == ["127.0.0.1", "127.0.0.2"]
        own.transport.connect("p", LAYOUT, metadata)
        assert finish(own.transport.read("p", [(0, 5)])) is ReadState.DONE
        assert (own.pools[0].data[5] == share(blocks, 1, 0)[0]).all()


@pytest.fixture
def source() -> Iterator[RankedWorker]:
    with ranked_worker(LAYOUT, 2, random_blocks(2, 4)) as worker:
        yield worker


@pytest.fixture
def own() -> Iterator[RankedWorker]:
    with ranked_worker(LAYOUT, 2, NUM_BLOCKS) as worker:
        yield worker


def test_a_rank_that_can_not_connect_fails_the_read_of_all(
    source: RankedWorker, own: RankedWorker
) -> None:
    metadata = source.transport.rank_metadata
    own.transport.connect("p", LAYOUT, (metadata[0], b"garbage"))
    read = own.transport.read("p", PAIRS)
    assert finish(read) is ReadState.FAILED
    assert "rank 1" in read.error and "metadata" in read.error
    own.transport.disconnect("p")
    own.transport.connect("q", LAYOUT, metadata)
    assert finish(own.transport.read("q", PAIRS)) is ReadState.DONE


def test_a_peer_that_does_not_fit_is_refused_on_rank_0(
    source: RankedWorker, own: RankedWorker
) -> None:
    metadata = source.transport.rank_metadata
    for other in (whole_layout(3, 4), whole_layout(2, 8), whole_layout(2, 4, "float32")):
        with pytest.raises(TransferError, match="differ"):
            own.transport.connect("p", other, metadata)
    for wrong in ((), (metadata[0],) * 3, (metadata[0],), metadata * 2):
        with pytest.raises(TransferError):
            own.transport.connect("p", LAYOUT, wrong)
    own.transport.disconnect("p")
    assert not own.ranks.lost


def test_a_rank_that_does_not_let_go_of_a_peer_is_given_up(
    source: RankedWorker, own: RankedWorker
) -> None:
    own.transport.connect("p", LAYOUT, source.transport.rank_metadata)
    assert finish(own.transport.read("p", PAIRS)) is ReadState.DONE
    own.ranks.frozen.add(1)
    read = own.transport.read("p", PAIRS)
    began = time.monotonic()
    with pytest.raises(WorkerLostError, match=r"Ranks \[1\] did not let go of peer p"):
        own.transport.disconnect("p")
    assert LET_GO_S <= time.monotonic() - began < LET_GO_S + 5
    with pytest.raises(WorkerLostError):
        finish(read)


def test_a_lost_rank_is_noticed_by_whoever_looks(source: RankedWorker, own: RankedWorker) -> None:
    own.transport.connect("p", LAYOUT, source.transport.rank_metadata)
    own.ranks.frozen.add(1)
    read = own.transport.read("p", PAIRS)
    own.transport.check()
    assert read.poll() is ReadState.PENDING
    own.ranks.lost = "rank 1 is gone"
    for look in (own.transport.check, lambda: finish(read)):
        with pytest.raises(WorkerLostError, match="rank 1 is gone"):
            look()


def test_every_rank_has_let_go_when_disconnect_returns(
    source: RankedWorker, own: RankedWorker
) -> None:
    own.transport.connect("p", LAYOUT, source.transport.rank_metadata)
    reads = [own.transport.read("p", PAIRS) for _ in range(50)]
    own.transport.disconnect("p")
    assert all(read.poll() is not ReadState.PENDING for read in reads)
    before = [pool.data.copy() for pool in own.pools]
    for pool in source.pools:
        pool.data[:] = 7
    own.transport.connect("q", LAYOUT, source.transport.rank_metadata)
    assert finish(own.transport.read("q", [(0, 5)])) is ReadState.DONE
    for pool, then in zip(own.pools, before, strict=True):
        assert (pool.data[:5] == then[:5]).all()
    own.transport.disconnect("never")


def test_close_shuts_every_rank_and_may_be_repeated(source: RankedWorker) -> None:
    metadata = source.transport.rank_metadata
    source.transport.close()
    source.transport.close()
    with ranked_worker(LAYOUT, 2, NUM_BLOCKS) as own:
        own.transport.connect("p", LAYOUT, metadata)
        with suppress(TransferError):  # whoever asks late is told at once
            assert finish(own.transport.read("p", PAIRS)) is ReadState.FAILED


def test_a_rank_that_can_not_open_its_transport_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class SecondOnDevice(RankPool):
        count = 0

        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            SecondOnDevice.count += 1
            self.device_id = 0 if SecondOnDevice.count == 2 else None

    monkeypatch.setattr("tests.support.kv_ranks.RankPool", SecondOnDevice)
    with (
        pytest.raises(TransferError, match=r"Rank 1 can't move its KV: .*CUDA"),
        ranked_worker(LAYOUT, 2, NUM_BLOCKS),
    ):
        raise AssertionError("not reached")


def test_a_rank_that_can_not_go_on_ends_the_engine(own: RankedWorker) -> None:
    own.ranks.channels[1].inbox.put(b"\xff\xff")
    deadline = time.monotonic() + 5
    with pytest.raises(WorkerLostError, match="parsing"):
        while time.monotonic() < deadline:
            own.transport.check()


@dataclass
class Part:
    """A part of a READ that a test ends."""

    state: ReadState = ReadState.PENDING
    error: str = ""
    duration_s: float = 0.0
    polls: int = 0

    def poll(self) -> ReadState:
        self.polls += 1
        return self.state

    def fail(self, error: str) -> None:
        self.state, self.error = ReadState.FAILED, error


def test_a_read_fails_only_when_no_part_is_pending() -> None:
    parts = [Part(), Part(), Part()]
    given_up: list[bool] = []
    read = JoinedRead(parts, lambda: given_up.append(True))
    assert read.poll() is ReadState.PENDING
    parts[1].fail("lost")
    for _ in range(2):
        assert read.poll() is ReadState.PENDING
        assert given_up == [True], "once"
    parts[0].fail("disconnected")
    assert read.poll() is ReadState.PENDING
    parts[2].state = ReadState.DONE
    assert read.poll() is ReadState.FAILED
    assert read.error == "lost", "the first cause"


def test_a_read_is_done_with_its_last_part_and_takes_as_long_as_the_longest() -> None:
    parts = [Part(duration_s=0.2), Part(duration_s=0.5)]
    read = JoinedRead(parts, lambda: pytest.fail("nothing failed"))
    parts[1].state = ReadState.DONE
    assert read.poll() is ReadState.PENDING
    parts[0].state = ReadState.DONE
    assert read.poll() is ReadState.DONE
    assert read.duration_s == 0.5
    assert parts[1].polls == 1, "what is final is not asked again"
