"""Hand-overs struck half way, by SIGKILL, SIGSTOP or a network that swallows everything.

The bytes of prefill's blocks pass a proxy that goes dark inside one READ, so each strike finds that
READ half done. Whatever is struck, the answer is the one of transformers and no block stays held.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import QUICK_START, Cluster, Worker, cluster, routed
from tests.support.process import wait_until
from tests.support.stream import LONG_PROMPT, Stream, busy, prefilling
from tests.support.wires import SETTINGS, Wires, wires

HALF_A_READ = 9 * (256 << 10) + 1000
"""A READ moves a chunk, which is four blocks of 256 KiB: two of them and some of the third."""
LEASE_S = 1.5
PEER_SILENCE_S = 5.0
WORKER_SILENCE_S = 6.0
READ_TIMEOUT_S = 10.0
BUSY_MACHINE_S = 20.0

Wired = tuple[Cluster, Wires]


@pytest.fixture(scope="module")
def wired(request: pytest.FixtureRequest, slow_llama: Path) -> Iterator[Wired]:
    with (
        cluster(
            slow_llama,
            transport=request.param,
            worker={**QUICK_START, "max_step_tokens": 64, "stall_after_s": "3s"},
            # Room for one long prompt: the next one takes the same blocks.
            prefill_worker={**SETTINGS, "lease_ttl_s": LEASE_S, "num_blocks": 48},
            decode_worker={"peer_silence_s": PEER_SILENCE_S, "probe_bytes": 0},
            router={
                "worker_silence_s": WORKER_SILENCE_S,
                "no_worker_grace_s": "2s",
                # The pair is tried again at once: here its failures are on purpose, and over.
                "breaker_open_s": "10ms",
                "breaker_open_max_s": "10ms",
            },
        ) as system,
        wires(system.prefill[0]) as between,
    ):
        yield system, between


over_tcp = pytest.mark.parametrize("wired", ["tcp"], indirect=True)
over_nixl = pytest.mark.parametrize("wired", ["nixl"], indirect=True)


@pytest.fixture(autouse=True)
def whole_again(wired: Wired) -> None:
    """Before each test the network is whole, every worker runs and every cache is empty."""
    system, between = wired
    between.mend()
    for worker in system.workers:
        if worker.process is None:
            worker.start()
    system.wait_ready()
    system.wait_balanced(BUSY_MACHINE_S)
    for worker in system.workers:
        worker.flush_cache()


def struck_half_way(system: Cluster, between: Wires) -> Stream:
    """A long request, one of whose READs is half done and stays so."""
    between.data.black_hole_after(HALF_A_READ)
    stream = Stream(system)
    between.data.wait_dark(30)
    return stream


def victim_of(system: Cluster, role: str) -> Worker:
    (victim,) = [worker for worker in system.workers if worker.role == role]
    return victim


@over_tcp
@pytest.mark.parametrize("swallows", ["everything", "messages", "bytes"])
def test_a_black_hole_between_the_two(wired: Wired, long_answer: list[int], swallows: str) -> None:
    # Met elsewhere: After days the link was gone, both sides looked healthy, and nothing
    # mended it.
    system, between = wired
    stream = struck_half_way(system, between)
    if swallows != "bytes":
        between.link.black_hole()
    if swallows == "messages":
        between.data.mend()
    began = time.monotonic()
    assert stream.ends_like(long_answer)
    noticed_s = READ_TIMEOUT_S if swallows == "bytes" else PEER_SILENCE_S
    assert time.monotonic() - began < noticed_s + BUSY_MACHINE_S
    # Both sides give up on their own, while nothing passes.
    system.wait_balanced(LEASE_S + BUSY_MACHINE_S)

    # Once it passes again, what was on its way harms nobody, and the pair works as before.
    between.mend()
    system.wait_balanced(BUSY_MACHINE_S)
    for worker in system.workers:
        worker.flush_cache()
    moved = between.data.num_answered
    assert Stream(system).ends_like(long_answer)
    assert between.data.num_answered > moved + HALF_A_READ


@over_tcp
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_either_side_killed(wired: Wired, long_answer: list[int], role: str) -> None:
    system, between = wired
    stream = struck_half_way(system, between)
    victim_of(system, role).kill()
    between.mend()
    assert stream.ends_like(long_answer)
    system.wait_balanced(LEASE_S + BUSY_MACHINE_S)


@over_tcp
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_either_side_frozen(wired: Wired, long_answer: list[int], role: str) -> None:
    system, between = wired
    stream = struck_half_way(system, between)
    with victim_of(system, role).frozen():
        between.mend()
        assert stream.ends_like(long_answer)
    system.wait_balanced(LEASE_S + BUSY_MACHINE_S)


@over_tcp
def test_blocks_overwritten_while_decode_was_frozen_are_not_used(
    wired: Wired, slow_llama: Path, long_answer: list[int]
) -> None:
    """Decode wakes up with all it was told still true to it, and reads what is another's by now."""
    # Met elsewhere: An abort freed blocks that a late transfer still wrote to: one
    # request's text in another's.
    system, between = wired
    prefill, decode = system.workers
    with routed(slow_llama, prefill=[prefill], decode=[]) as alone:
        Stream(system, prompt="Open the link", max_tokens=2).wait()
        between.data.black_hole()
        stream = Stream(system)
        wait_until(lambda: stream.ids, 30, "the prompt to be complete")
        with decode.frozen():
            between.link.black_hole()
            wait_until(lambda: not prefill.describe().load.leases, 30, "the lease to run out")
            overwriting = Stream(alone, prompt=LONG_PROMPT[700::-1], max_tokens=1)
            overwriting.wait()
            assert not overwriting.error
            between.data.mend()
        assert stream.ends_like(long_answer)
    between.mend()
    assert Stream(system).ends_like(long_answer), "a prefix cache holds none of it either"
    system.wait_balanced(LEASE_S + BUSY_MACHINE_S)


@over_nixl
def test_messages_swallowed_while_nixl_reads(wired: Wired, long_answer: list[int]) -> None:
    system, between = wired
    stream = Stream(system)
    busy(system.prefill, prefilling)
    busy(system.decode, lambda load: load.held_blocks > 0)
    between.link.black_hole()
    assert stream.ends_like(long_answer)
    system.wait_balanced(LEASE_S + BUSY_MACHINE_S)
