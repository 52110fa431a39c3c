"""READs that fail on purpose over a real transport: what lands, and that nothing lands later."""

from core.clock import monotonic
from kvtransfer.faulty import FaultyTransport
from kvtransfer.rank_transport import RankTransport
from kvtransfer.stamps import PoolStamps
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import ReadState
from telemetry.faults import Faults, parse_faults
from tests.support.kv import HostPool, finish

PAIRS = [(0, 3), (1, 2), (2, 1), (3, 0)]


def read(faults: str) -> tuple[ReadState, str, HostPool]:
    source, target = HostPool(4, 4096), HostPool(5, 4096)
    source.fill(1)
    serving = TcpTransport(source, host="127.0.0.1", token=b"")
    own = TcpTransport(target, host="127.0.0.1", token=b"")
    ranked = RankTransport(own, target.layout, PoolStamps(target, target.layout))
    transport = FaultyTransport(ranked, target, Faults(parse_faults(faults)), monotonic)
    try:
        transport.connect("p", source.layout, (serving.metadata(),))
        started = transport.read("p", PAIRS)
        state = finish(started)
        assert started.poll() is state
        return state, started.error, target
    finally:
        transport.close()
        serving.close()


def test_a_short_read_brings_some_blocks_and_fails() -> None:
    state, error, pool = read("kv.read:short")
    assert (state, error) == (ReadState.FAILED, "injected fault kv.read:short")
    assert pool.holds(PAIRS[:2], 1) and not pool.words[[1, 0]].any()


def test_a_corrupt_read_leaves_rubbish_in_its_own_blocks_alone() -> None:
    state, error, pool = read("kv.read:corrupt")
    assert (state, error) == (ReadState.FAILED, "injected fault kv.read:corrupt")
    assert (pool.words[:4] == 0xA5A5A5A5A5A5A5A5).all() and not pool.words[4].any()


def test_a_failed_read_brings_nothing() -> None:
    state, _, pool = read("kv.read:fail")
    assert state is ReadState.FAILED and not pool.words.any()
