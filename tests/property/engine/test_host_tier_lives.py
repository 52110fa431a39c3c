"""A few prompts asked again and again over a pool that holds two of them: they leave and come back.

Whatever the copies do meanwhile, every token is the one of an undisturbed engine. The executor
computes tokens from the KV that it reads, so a block of wrong or half content can't go unnoticed.
"""

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.engine import Engine
from tests.support.engine import FakeClock, Transcript, WatchedEngine, make_config, make_request
from tests.support.fake_executor import DIGEST, FakeExecutor, undisturbed
from tests.support.host_memory import FakeHostMemory

BLOCK_SIZE = 4
STEM = [9, 8, 7, 6, 5, 4, 3, 2]
PROMPTS = (
    [*STEM, 1, 1, 1, 1, 1],
    [*STEM, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    [3] * 14,
    [4] * 9,
    [5] * 17,
)


@dataclass
class Ask:
    """Send a prompt, and get on until it has ended."""

    prompt: int
    max_tokens: int
    patient: bool
    """Wait for its end."""


@dataclass
class Meanwhile:
    """What else happens."""

    copied: int
    delay: int
    steps: int
    abort: bool
    flush: bool
    reserve: int | None


asks = st.builds(Ask, st.integers(0, len(PROMPTS) - 1), st.sampled_from([1, 3, 9]), st.booleans())
meanwhiles = st.builds(
    Meanwhile,
    copied=st.sampled_from([0, 1, 2, 9]),
    delay=st.sampled_from([0, 0, 1, 3, 30]),
    steps=st.integers(0, 3),
    abort=st.sampled_from([False, False, False, True]),
    flush=st.sampled_from([False] * 12 + [True]),
    reserve=st.sampled_from([None, None, None, 0, 2]),
)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    lives=st.lists(st.tuples(asks, meanwhiles), min_size=5, max_size=30),
    num_blocks=st.integers(7, 12),
    num_host_blocks=st.sampled_from([2, 5, 12, 30]),
    max_step_tokens=st.sampled_from([4, 16]),
    overlaps=st.booleans(),
)
def test_prompts_come_back_right(
    lives: list[tuple[Ask, Meanwhile]],
    num_blocks: int,
    num_host_blocks: int,
    max_step_tokens: int,
    overlaps: bool,
) -> None:
    executor = FakeExecutor(
        num_blocks, BLOCK_SIZE, overlaps=overlaps, num_host_blocks=num_host_blocks
    )
    config = make_config(max_num_seqs=3, max_step_tokens=max_step_tokens)
    engine = WatchedEngine(config, executor, model_digest=DIGEST, clock=FakeClock())
    life = _Life(engine, executor)
    for ask, meanwhile in lives:
        life.ask(ask)
        life.meanwhile(meanwhile)
    life.end()


class _Life:
    def __init__(self, engine: Engine, executor: FakeExecutor) -> None:
        assert executor.pool.host_memory is not None
        self.engine = engine
        self.executor = executor
        self.memory: FakeHostMemory = executor.pool.host_memory
        self.transcript = Transcript()
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.count = 0

    def ask(self, ask: Ask) -> None:
        self.count += 1
        request = make_request(f"r{self.count}", PROMPTS[ask.prompt], max_tokens=ask.max_tokens)
        self.engine.add(request)
        self.expected[request.request_id] = undisturbed(
            PROMPTS[ask.prompt], request.sampling, max_len=self.engine.max_model_len
        )
        if ask.patient:
            self.until_idle()

    def meanwhile(self, what: Meanwhile) -> None:
        self.memory.delay = what.delay
        for _ in range(what.steps):
            self.step()
        self.memory.run(what.copied)
        self.executor.run_device()
        if what.abort and f"r{self.count}" not in self.transcript.ends:
            self.engine.abort(f"r{self.count}")
            self.aborted.add(f"r{self.count}")
        if what.flush:
            self.engine.flush_cache()
            assert not self.engine.stats().host.cached_blocks
        if what.reserve is not None:
            self.reserve(what.reserve)
        self.balanced()

    def reserve(self, prompt: int) -> None:
        """KV arrives from elsewhere, in blocks that were cached, or being saved, until now."""
        self.count += 1
        request = make_request(f"r{self.count}", PROMPTS[prompt], max_tokens=3)
        reservation = self.engine.reserve(request)
        if reservation is None:
            return
        for block_id in reservation.block_table[reservation.num_cached_blocks :]:
            self.executor.pool.blocks[block_id][:] = [-5] * BLOCK_SIZE
        self.engine.cancel(reservation)

    def until_idle(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("it hangs")

    def step(self) -> None:
        for output in self.engine.step().outputs:
            self.transcript.take(output)

    def balanced(self) -> None:
        self.engine.check_integrity()
        host = self.engine.stats().host
        assert host.free_blocks + host.cached_blocks + host.held_blocks == host.total_blocks

    def end(self) -> None:
        self.until_idle()
        self.memory.delay = 0
        for _ in range(100):
            self.engine.tend()
        self.balanced()
        stats = self.engine.stats()
        assert stats.held_blocks == stats.host.held_blocks == 0
        for request_id, expected in self.expected.items():
            tokens = self.transcript.tokens.get(request_id, [])
            whole = request_id not in self.aborted
            assert tokens == (expected if whole else expected[: len(tokens)])
