"""What a worker says of the blocks in its host's memory, and what placement makes of it."""

from core.block_hash import hash_blocks
from core.sampling import SamplingParams
from router.fleet.wire import cache_from_proto, load_from_proto
from router.fleet.worker import WorkerInfo
from router.placement.cost import CostSettings, Prompt
from router.placement.placer import Placer
from rpc.v1 import worker_pb2
from tests.support.engine import FakeClock
from tests.support.loops import BLOCK_SIZE, Side, make_side, sampling_to_proto
from tests.support.router_placement import make_info

PROMPT = [1 + i % 90 for i in range(17)]
SLOW = CostSettings(prefill_tokens_per_s=1.0, decode_step_s=0.01, transfer_bytes_per_s=1e6)
"""So slow that any copy is faster."""


def hashes_of(prompt: list[int]) -> list[bytes]:
    return hash_blocks(prompt, BLOCK_SIZE, b"root")


def compute(side: Side, clock: FakeClock, name: str, prompt: list[int]) -> None:
    submit = worker_pb2.Submit(
        request_id=name,
        attempt=1,
        prompt_ids=prompt,
        sampling=sampling_to_proto(SamplingParams(max_tokens=2, ignore_eos=True)),
        deadline_ms=10_000,
        block_hashes=b"".join(hashes_of(prompt)),
        local=worker_pb2.Local(),
    )
    side.router(submit=submit)
    for _ in range(20):
        clock.now += 0.1
        side.loop.turn()
    (end,) = side.finished(name)
    assert end.reason == worker_pb2.FINISH_REASON_LENGTH


def tell(placer: Placer, side: Side) -> float:
    """Hand on what the worker has said since it was last asked; returns its rate of copies."""
    rate = 0.0
    for event in side.pipe.sent:
        if event.worker.message.HasField("cache"):
            placer.apply("w", cache_from_proto(event.worker.message.cache))
        if event.HasField("heartbeat"):
            load = load_from_proto(event.heartbeat.load)
            rate = load.host_bytes_per_s
            placer.report("w", load, 1.0)
    side.pipe.sent.clear()
    return rate


def place(placer: Placer) -> dict[str, object]:
    def hashes_for(_: WorkerInfo) -> list[bytes]:
        return hashes_of(PROMPT)

    prompt = Prompt(num_tokens=len(PROMPT), max_new_tokens=2)
    decision = placer.place(prompt, hashes_for, 1.0)
    assert decision.rankings[0].part == "local"
    return {**decision.candidates[0].as_dict(), "rate": decision.as_dict()["host_copy_rate"]}


def test_blocks_in_host_memory_cost_what_the_worker_says_that_copies_take() -> None:
    clock = FakeClock()
    side = make_side("decode", clock=clock, pools={}, num_blocks=12, num_host_blocks=24)
    info = make_info("decode", "w", epoch=7)
    placer = Placer(SLOW)
    placer.add("w", info)
    side.router(hello=worker_pb2.RouterHello(router_id="x"))
    side.loop.turn()
    assert tell(placer, side) == 0, "nothing was copied yet"

    compute(side, clock, "first", PROMPT)
    tell(placer, side)
    on_device = place(placer)
    assert (on_device["cached_tokens"], on_device["host_tokens"]) == (16, 0)
    assert on_device["host_copy_s"] == 0 and on_device["rate"] is None

    for other in (20, 40, 60):
        compute(side, clock, f"other{other}", [other + token for token in PROMPT])
    rate = tell(placer, side)
    assert rate > 0
    on_host = place(placer)
    assert on_host["cached_tokens"] == 16, "all of it can still be had"
    tokens = on_host["host_tokens"]
    assert isinstance(tokens, int) and tokens >= BLOCK_SIZE
    copy_s = tokens / BLOCK_SIZE * info.layout.block_bytes / rate
    assert on_host["host_copy_s"] == round(copy_s, 6)
    assert on_host["rate"] == {"bytes_per_s": round(rate), "measured": True}

    compute(side, clock, "again", PROMPT)
    tell(placer, side)
    assert place(placer)["host_tokens"] == 0, "it came back"
    assert side.engine.stats().host.hit_tokens >= tokens
