"""What every KV transport must do, with real processes at the other end."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import cache

import numpy as np
import pytest

from core.errors import TransferError
from kvtransfer.mooncake_engine import load_mooncake
from kvtransfer.nixl import NixlTransport
from kvtransfer.transport import BlockPieces, Piece, ReadState, Transport
from tests.support.kv import (
    HAS_READ,
    TOKEN,
    HostPool,
    finish,
    open_named,
    peer,
    ucx_env,
    words_of,
)
from tests.support.process import frozen, wait_until

BLOCK_BYTES = 1 << 16
NUM_BLOCKS = 64
BIG = {"num_blocks": 64, "block_bytes": 1 << 20}
"""More than all socket buffers between two processes hold."""

TRANSPORTS = ["tcp", "nixl", "nixl+tcp", "mooncake", "gpu"]
NETWORKED = ["tcp", "nixl+tcp", "mooncake"]
"""Those whose READ needs the peer's help, so that a frozen peer leaves it pending."""


@pytest.fixture(params=TRANSPORTS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "mooncake":
        try:
            load_mooncake()
        except TransferError as error:
            pytest.skip(error.message)
    for variable, value in ucx_env(request.param).items():
        monkeypatch.setenv(variable, value)
    return str(request.param)


def own_pool(num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES) -> HostPool:
    return HostPool(num_blocks, block_bytes)


@pytest.fixture(scope="module")
def standing() -> Iterator[Callable[[str, int], bytes]]:
    """Metadata of peers that no test harms, by transport and seed; each is started once."""
    with ExitStack() as stack:

        @cache
        def start(name: str, seed: int) -> bytes:
            return stack.enter_context(
                peer(name, num_blocks=200, block_bytes=BLOCK_BYTES, seed=seed)
            )[1]

        yield start


Standing = Callable[[str, int], bytes]


@pytest.fixture
def pool() -> HostPool:
    return own_pool()


@pytest.fixture
def transport(name: str, pool: HostPool) -> Iterator[Transport]:
    transport = open_named(name, pool)
    yield transport
    transport.close()


def test_read_random_block_sets_copies_every_byte_to_its_place(
    name: str, pool: HostPool, transport: Transport, standing: Standing
) -> None:
    rng = random.Random(7)
    transport.connect("p", standing(name, 1))
    for count in (1, 2, 17, NUM_BLOCKS):
        pool.clear()
        own = rng.sample(range(NUM_BLOCKS), count)
        remote = [rng.randrange(200) for _ in range(count)]
        if count == 17:
            own, remote = list(range(40, 57)), list(range(100, 117))
        pairs = list(zip(remote, own, strict=True))
        read = transport.read("p", pairs)
        assert finish(read) is ReadState.DONE, read.error
        assert pool.holds(pairs, 1)
        untouched = [block for block in range(NUM_BLOCKS) if block not in own]
        assert not pool.words[untouched].any()


@pytest.mark.parametrize("name", ["nixl"], indirect=True)
@pytest.mark.parametrize("descriptor_bytes", [BLOCK_BYTES // 4, 3 * 4096, BLOCK_BYTES * 9])
def test_blocks_cut_into_descriptors_arrive_whole(
    name: str, standing: Standing, descriptor_bytes: int
) -> None:
    pool = own_pool()
    transport = NixlTransport(pool, token=TOKEN.encode(), descriptor_bytes=descriptor_bytes)
    transport.connect("p", standing(name, 1))
    pairs = [(199 - i, i) for i in range(0, NUM_BLOCKS, 3)]
    assert finish(transport.read("p", pairs)) is ReadState.DONE
    assert pool.holds(pairs, 1)
    transport.close()


@pytest.mark.parametrize("own_bytes", [BLOCK_BYTES // 2, BLOCK_BYTES * 2])
def test_pieces_of_smaller_and_larger_blocks_arrive_in_their_places(
    name: str, standing: Standing, own_bytes: int
) -> None:
    pool = own_pool(NUM_BLOCKS, own_bytes)
    transport = open_named(name, pool)
    pieces = (Piece(4096, 0, 8192), Piece(12288, 16384, 64), Piece(0, own_bytes - 8, 8))
    transport.connect("p", standing(name, 1), BlockPieces(BLOCK_BYTES, pieces))
    for pairs in ([(i + 9, i + 3) for i in range(20)], [(199, 0), (3, 63), (7, 21)]):
        pool.clear()
        expected = pool.words.copy()
        for remote, own in pairs:
            source = words_of(remote, 1, BLOCK_BYTES)
            for piece in pieces:
                start, at, count = (number // 8 for number in piece)
                expected[own, at : at + count] = source[start : start + count]
        assert finish(transport.read("p", pairs)) is ReadState.DONE
        assert (pool.words == expected).all()
    transport.close()


def test_many_small_pieces_of_many_blocks_swap_the_halves_of_each(
    name: str, pool: HostPool, transport: Transport, standing: Standing
) -> None:
    size, half = 512, BLOCK_BYTES // 2
    offsets = range(0, half, size)
    pieces = [Piece(half + at, at, size) for at in offsets]
    pieces += [Piece(at, half + at, size) for at in offsets]
    transport.connect("p", standing(name, 2), BlockPieces(BLOCK_BYTES, tuple(pieces)))
    assert finish(transport.read("p", [(i, i) for i in range(NUM_BLOCKS)])) is ReadState.DONE
    words = half // 8
    for block in range(NUM_BLOCKS):
        expected = np.roll(words_of(block, 2, BLOCK_BYTES), words)
        assert (pool.words[block] == expected).all()


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (Piece(0, 0, 0),),
        (Piece(-8, 0, 8),),
        (Piece(0, -8, 8),),
        (Piece(BLOCK_BYTES - 8, 0, 16),),
        (Piece(0, BLOCK_BYTES - 8, 16),),
        (Piece(0, 0, 16), Piece(64, 8, 16)),
    ],
)
def test_pieces_outside_a_block_or_on_top_of_each_other_are_refused(
    transport: Transport, pieces: tuple[Piece, ...]
) -> None:
    with pytest.raises(TransferError):
        transport.connect("p", transport.metadata(), BlockPieces(BLOCK_BYTES, pieces))
    with pytest.raises(TransferError, match=f"hold {BLOCK_BYTES} bytes, not 512"):
        transport.connect("p", transport.metadata(), BlockPieces(512, (Piece(0, 0, 8),)))


def test_peer_reads_from_us_while_we_read_from_it(
    name: str, pool: HostPool, transport: Transport
) -> None:
    pool.words[0] = 5
    sizes = {"num_blocks": NUM_BLOCKS, "block_bytes": BLOCK_BYTES}
    with peer(name, seed=4, reads=transport.metadata(), **sizes) as (reader, metadata):
        transport.connect("p", metadata)
        reader.wait_for_line(HAS_READ, 20)
        read = transport.read("p", [(0, 1)])
        assert finish(read) is ReadState.DONE
        assert (pool.words[1] == 5).all(), "the peer holds what it has read from our block 0"


def test_reads_from_two_peers_at_once_do_not_mix(
    name: str, pool: HostPool, transport: Transport, standing: Standing
) -> None:
    transport.connect("a", standing(name, 1))
    transport.connect("b", standing(name, 2))
    jobs = [
        (seed, [(8 * k + i, 8 * k + i) for i in range(8)], "ab"[seed - 1])
        for k, seed in enumerate([1, 2] * 4)
    ]
    reads = [transport.read(peer_id, pairs) for _, pairs, peer_id in jobs]
    assert [finish(read) for read in reads] == [ReadState.DONE] * len(reads)
    assert all(pool.holds(pairs, seed) for seed, pairs, _ in jobs)


def test_read_of_blocks_that_do_not_exist_is_refused(
    name: str, pool: HostPool, transport: Transport, standing: Standing
) -> None:
    transport.connect("p", standing(name, 1))
    refused = [[(200, 0)], [(0, NUM_BLOCKS)], [(-1, 0)], [(0, -1)], [(0, 5), (1, 5)], []]
    for pairs in refused:
        with pytest.raises(TransferError):
            transport.read("p", pairs)
    with pytest.raises(TransferError):
        transport.read("nobody", [(0, 0)])
    assert finish(transport.read("p", [(0, 0)])) is ReadState.DONE
    assert not pool.words[1:].any()


def test_blocks_of_another_size_are_refused(name: str, transport: Transport) -> None:
    other = open_named(name, own_pool(4, BLOCK_BYTES * 2))
    with pytest.raises(TransferError, match="bytes"):
        transport.connect("p", other.metadata())
    other.close()


def test_garbage_metadata_is_refused(transport: Transport) -> None:
    good = transport.metadata()
    for bad in (b"", b"x", bytes(200), good[: len(good) // 2], b"y" + good[1:], good[8:]):
        with pytest.raises(TransferError):
            transport.connect("p", bad)


def test_peer_with_another_token_can_not_be_read(
    name: str, pool: HostPool, transport: Transport
) -> None:
    with peer(name, num_blocks=8, block_bytes=BLOCK_BYTES, seed=1, token="other") as (_, metadata):
        error = ""
        try:
            transport.connect("p", metadata)
            read = transport.read("p", [(0, 0)])
            assert finish(read) is ReadState.FAILED
            error = read.error
        except TransferError as refused:
            error = refused.message
        assert "token" in error
        assert not pool.words.any()


def test_peer_killed_mid_read_fails_it(name: str) -> None:
    # Met elsewhere: One transport broke under load, and there was no other.
    pool = own_pool(**BIG)
    transport = open_named(name, pool)
    pairs = [(i, i) for i in range(pool.num_blocks)]
    with peer(name, seed=1, **BIG) as (process, metadata):
        transport.connect("p", metadata)
        assert finish(transport.read("p", [(0, 0)])) is ReadState.DONE
        with frozen(process.pid):
            read = transport.read("p", pairs)
            process.kill_group()
        state = finish(read, 10)
        if name in NETWORKED:
            assert state is ReadState.FAILED and read.error
        with suppress(TransferError):
            # What is mapped stays, though its process is gone: leases tell that it is stale.
            after = ReadState.DONE if name == "gpu" else ReadState.FAILED
            assert finish(transport.read("p", pairs), 10) is after
    transport.disconnect("p")
    with peer(name, seed=2, **BIG) as (_, metadata):
        transport.connect("p2", metadata)
        assert finish(transport.read("p2", pairs)) is ReadState.DONE
        assert pool.holds(pairs, 2)
    transport.close()


@pytest.mark.parametrize("name", NETWORKED, indirect=True)
def test_frozen_peer_blocks_nobody_and_writes_nothing_after_disconnect(
    name: str,
) -> None:
    pool = own_pool(**BIG)
    transport = open_named(name, pool)
    pairs = [(i, i) for i in range(pool.num_blocks - 1)]
    last = pool.num_blocks - 1
    with (
        peer(name, seed=1, **BIG) as (process, metadata),
        peer(name, seed=2, **BIG) as (_, healthy),
    ):
        transport.connect("p", metadata)
        transport.connect("healthy", healthy)
        assert finish(transport.read("p", [(0, 0)])) is ReadState.DONE
        with frozen(process.pid):
            read = transport.read("p", pairs)
            longest = 0.0
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                start = time.monotonic()
                assert read.poll() is ReadState.PENDING
                longest = max(longest, time.monotonic() - start)
            assert longest < 0.2
            other = transport.read("healthy", [(last, last)])
            start = time.monotonic()
            transport.disconnect("p")
            assert time.monotonic() - start < 2.0
            assert read.poll() is ReadState.FAILED and read.error
            assert finish(other) is ReadState.DONE
            assert pool.holds([(last, last)], 2)
            pool.clear()
        # The peer runs again; a READ on a new connection shows that it had its chance to write.
        transport.connect("again", metadata)
        with suppress(TransferError):
            again = transport.read("again", [(last, last)])
            wait_until(
                lambda: not process.running or again.poll() is not ReadState.PENDING,
                15,
                "the peer to answer or to end",
            )
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert not pool.words[:last].any()
    transport.close()


@pytest.mark.parametrize("name", NETWORKED, indirect=True)
def test_connect_to_frozen_peer_returns_and_can_be_undone(name: str) -> None:
    pool = own_pool()
    transport = open_named(name, pool)
    small = {"num_blocks": 8, "block_bytes": BLOCK_BYTES}
    with peer(name, seed=1, **small) as (process, metadata), frozen(process.pid):
        start = time.monotonic()
        transport.connect("p", metadata)
        read = transport.read("p", [(0, 0)])
        assert read.poll() is ReadState.PENDING
        transport.disconnect("p")
        assert time.monotonic() - start < 2.0
        assert read.poll() is ReadState.FAILED
    transport.close()
    assert not pool.words.any()


def test_restarted_peer_is_read_under_a_new_name(
    name: str, pool: HostPool, transport: Transport
) -> None:
    # Met elsewhere: Decode crashed when it met a restarted prefill worker.
    for epoch in (1, 2):
        with peer(name, num_blocks=8, block_bytes=BLOCK_BYTES, seed=epoch) as (_, metadata):
            transport.connect(f"p/{epoch}", metadata)
            assert finish(transport.read(f"p/{epoch}", [(7, 7)])) is ReadState.DONE
            assert pool.holds([(7, 7)], epoch)
            transport.disconnect(f"p/{epoch}")
            with pytest.raises(TransferError):
                transport.read(f"p/{epoch}", [(7, 7)])


def test_disconnect_and_close_may_be_repeated(name: str, pool: HostPool) -> None:
    transport = open_named(name, pool)
    transport.connect("self", transport.metadata())
    with pytest.raises(TransferError, match="already"):
        transport.connect("self", transport.metadata())
    transport.disconnect("self")
    transport.disconnect("self")
    transport.disconnect("never")
    transport.close()
    transport.close()


def test_close_ends_pending_reads(name: str) -> None:
    pool = own_pool(**BIG)
    transport = open_named(name, pool)
    with peer(name, seed=1, **BIG) as (process, metadata), frozen(process.pid):
        transport.connect("p", metadata)
        read = transport.read("p", [(i, i) for i in range(pool.num_blocks)])
        transport.close()
        assert read.poll() is not ReadState.PENDING
