import pytest

from core.block_hash import hash_blocks, root_hash
from core.errors import UnavailableError
from router.fleet.worker import CacheChange, WorkerInfo, WorkerLoad, WorkerState
from router.placement.cost import Prompt
from router.placement.placer import TRANSIT_S, Placer
from tests.support.router_placement import COST, make_info

TOKENS = list(range(40))


def hashes_for(info: WorkerInfo) -> list[bytes]:
    return hash_blocks(TOKENS, info.layout.block_size, root_hash(info.model_digest))


def no_hashes(_: WorkerInfo) -> list[bytes]:
    return []


def make_placer(**roles: str) -> Placer:
    placer = Placer(COST, prediction_ttl_s=5.0)
    for key, role in roles.items():
        placer.add(key, make_info(role, key))
    return placer


PROMPT = Prompt(num_tokens=40, max_new_tokens=8)


def test_own_placements_count_before_any_report() -> None:
    placer = make_placer(p0="prefill", p1="prefill", d0="decode", d1="decode")
    pairs = [placer.place(PROMPT, no_hashes, 1.0) for _ in range(4)]
    assert sorted(str(pair.prefill) for pair in pairs) == ["p0", "p0", "p1", "p1"]
    assert sorted(pair.worker for pair in pairs) == ["d0", "d0", "d1", "d1"]


def test_backlog_shrinks_with_time_and_a_report_replaces_what_it_includes() -> None:
    placer = make_placer(p="prefill", d="decode")

    def backlog(now: float) -> float:
        return placer.place(PROMPT, no_hashes, now).candidates[0].terms["backlog_s"]

    assert backlog(1.0) == 0
    assert backlog(1.0) == pytest.approx(0.04)
    assert backlog(1.05) == pytest.approx(0.03)
    placer.report("p", WorkerLoad(backlog_tokens=7, heartbeat_age_s=0.5), 1.53 + TRANSIT_S)
    assert backlog(1.53 + TRANSIT_S) == pytest.approx(0.047), "one was sent after it was taken"


def test_same_prefix_follows_the_first_request_before_any_cache_event() -> None:
    placer = make_placer(d0="decode", d1="decode")
    first = placer.place(PROMPT, hashes_for, 1.0)
    placer.report(first.worker, WorkerLoad(running=1), 1.1)
    second = placer.place(PROMPT, hashes_for, 1.2)
    assert second.worker == first.worker
    assert second.cached_tokens == 39


def test_prediction_that_nobody_confirms_expires() -> None:
    placer = make_placer(d="decode")
    placer.place(PROMPT, hashes_for, 1.0)
    assert placer.place(PROMPT, hashes_for, 3.4).cached_tokens == 39
    placer = make_placer(d="decode")
    placer.place(PROMPT, hashes_for, 1.0)
    assert placer.place(PROMPT, hashes_for, 6.1).cached_tokens == 0


def test_digests_do_not_share_blocks() -> None:
    placer = Placer(COST)
    placer.add("a", make_info("decode", model_digest=b"a"))
    placer.add("b", make_info("decode", model_digest=b"b"))
    for key in "ab":
        info = make_info("decode", model_digest=key.encode())
        placer.apply(
            key, CacheChange(epoch=1, seq=0, reset=True, stored=hashes_for(info), removed=[])
        )
    placement = placer.place(PROMPT, hashes_for, 1.0, model_digest=b"b")
    assert placement.worker == "b" and placement.cached_tokens == 39


def test_dropped_worker_is_gone_with_its_cache() -> None:
    placer = make_placer(d="decode")
    placer.place(PROMPT, hashes_for, 1.0)
    assert placer.indexed_blocks == 10
    placer.drop("d")
    assert placer.indexed_blocks == 0
    with pytest.raises(UnavailableError):
        placer.place(PROMPT, hashes_for, 1.0)
    placer.report("d", WorkerLoad(), 2.0)


def test_draining_worker_is_refused() -> None:
    placer = make_placer(d="decode")
    placer.report("d", WorkerLoad(state=WorkerState.DRAINING), 1.0)
    with pytest.raises(UnavailableError, match="draining"):
        placer.place(PROMPT, no_hashes, 1.0)
