"""READs that go on by themselves: started in the caller's thread once the peer's has connected."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from core.errors import TransferError
from kvtransfer import peer_reads
from kvtransfer.peer_reads import PeerReads, QueuedRead
from kvtransfer.transport import ReadState
from tests.support.kv import finish
from tests.support.process import wait_until


class Flight:
    """Copies that end when the test says so."""

    def __init__(self) -> None:
        self.took_s: float | None = None
        self.error = ""
        self.freed = 0

    def duration_s(self) -> float | None:
        assert not self.freed, "looked at after it was forgotten"
        if self.error:
            raise TransferError(self.error)
        return self.took_s

    def free(self) -> None:
        self.freed += 1


class Airport:
    """A channel to nowhere, whose READs are flights."""

    def __init__(self) -> None:
        self.may_open = threading.Event()
        self.flights: list[Flight] = []
        self.started: list[Sequence[int]] = []
        self.refuses = ""
        self.pending_at_close: list[ReadState] = []
        self.reads: list[QueuedRead] = []

    def open(self) -> bool:
        assert self.may_open.wait(10)
        return True

    def read(self, remote_ids: Sequence[int], own_ids: Sequence[int]) -> Flight:
        if self.refuses:
            raise TransferError(self.refuses)
        self.started.append(remote_ids)
        self.flights.append(Flight())
        return self.flights[-1]

    def interrupt(self) -> None:
        self.may_open.set()

    def close(self) -> None:
        self.pending_at_close = [read.state for read in self.reads]


@pytest.fixture
def airport() -> Airport:
    return Airport()


@pytest.fixture
def peer(airport: Airport) -> Iterator[PeerReads]:
    peer = PeerReads("p", airport)
    yield peer
    peer.close()
    assert all(flight.freed == 1 for flight in airport.flights)


def submitted(peer: PeerReads, airport: Airport, *ids: int) -> QueuedRead:
    read = QueuedRead(peer, ids, ids)
    peer.submit(read)
    airport.reads.append(read)
    return read


def opened(peer: PeerReads, airport: Airport) -> QueuedRead:
    """One READ from before the opening, started by it."""
    read = submitted(peer, airport, 0)
    airport.may_open.set()
    wait_until(lambda: airport.flights, 10, "the first READ")
    return read


def test_reads_before_and_after_the_opening_start_in_order(
    peer: PeerReads, airport: Airport
) -> None:
    before = [submitted(peer, airport, number) for number in (1, 2)]
    assert [read.poll() for read in before] == [ReadState.PENDING] * 2
    airport.may_open.set()
    wait_until(lambda: len(airport.flights) == 2, 10, "both READs")
    after = submitted(peer, airport, 3)
    assert airport.started == [(1,), (2,), (3,)]
    airport.flights[1].took_s = 0.25
    assert [read.poll() for read in (*before, after)] == [
        ReadState.PENDING,
        ReadState.DONE,
        ReadState.PENDING,
    ]
    assert before[1].duration_s == 0.25
    assert airport.flights[1].freed == 1


def test_a_read_that_breaks_fails_all_after_the_channel_was_closed(
    peer: PeerReads, airport: Airport
) -> None:
    first = opened(peer, airport)
    second = submitted(peer, airport, 1)
    airport.flights[1].error = "the link fell"
    assert second.poll() is ReadState.PENDING, "copies may still land"
    assert finish(second) is ReadState.FAILED and "the link fell" in second.error
    assert finish(first) is ReadState.FAILED
    assert airport.pending_at_close == [ReadState.PENDING] * 2
    with pytest.raises(TransferError, match="Peer p is lost: the link fell"):
        submitted(peer, airport, 2)


def test_a_read_that_can_not_start_fails_all_after_the_channel_was_closed(
    peer: PeerReads, airport: Airport
) -> None:
    first = opened(peer, airport)
    airport.refuses = "no such stream"
    second = submitted(peer, airport, 1)
    third = None
    try:
        third = submitted(peer, airport, 2)
    except TransferError as lost:
        assert "no such stream" in lost.message
    for read in filter(None, (first, second, third)):
        assert finish(read) is ReadState.FAILED and "no such stream" in read.error
    assert set(airport.pending_at_close) == {ReadState.PENDING}


def test_closing_fails_what_is_under_way(peer: PeerReads, airport: Airport) -> None:
    read = opened(peer, airport)
    peer.close()
    assert read.poll() is ReadState.FAILED and "disconnected" in read.error


def test_only_so_many_are_under_way(
    peer: PeerReads, airport: Airport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_reads, "MAX_QUEUED_READS", 2)
    first = opened(peer, airport)
    submitted(peer, airport, 1)
    with pytest.raises(TransferError, match="2 READs wait for peer p"):
        submitted(peer, airport, 2)
    airport.flights[0].took_s = 0.1
    assert first.poll() is ReadState.DONE
    submitted(peer, airport, 3)
