"""Builders for engine tests, and an engine on a fake executor that is watched from outside."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar.compiler import GrammarCompiler
from engine.request import EngineRequest, SequenceOutput
from tests.support.fake_executor import DIGEST, VOCAB_SIZE, FakeExecutor


class WatchedEngine(Engine):
    """Looks after every call at the blocks of the steps in flight: nobody else may have them."""

    _CALLS = (
        *("add", "abort", "step", "settle", "reap", "hold", "release"),
        *("reserve", "cancel", "adopt", "flush_cache", "tend"),
    )

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if name not in WatchedEngine._CALLS:
            return value

        def watched(*arguments: object) -> object:
            try:
                return value(*arguments)
            finally:
                self._watch()

        return watched

    def _watch(self) -> None:
        executor = self._executor
        assert isinstance(executor, FakeExecutor)
        if executor.broken is not None:
            raise executor.broken
        sequences = list(self._sequences)
        copies = self._copies
        loading = {b for load in copies._loads for b in load.block_ids} if copies else set()
        for step in executor.in_flight:
            for chunk in step.plan.chunks:
                table = chunk.block_table
                assert not loading & set(table), "a step in flight uses a block on its way back"
                assert all(self._blocks.references(block_id) for block_id in table), (
                    "a step in flight uses a block that is free"
                )
                written = set(table[chunk.start // executor.pool.block_size :])
                owners = [s.request_id for s in sequences if written & set(s.block_table)]
                assert owners == [chunk.request_id], "another one has a block that is written"


class FakeClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def clock_of(engine: Engine) -> FakeClock:
    """The clock that `make_engine` gave it."""
    clock = engine._clock
    assert isinstance(clock, FakeClock)
    return clock


def make_config(**settings: object) -> EngineConfig:
    """A configuration with small limits."""
    return EngineConfig(**{"model": "fake", "max_step_tokens": 16, "max_num_seqs": 8, **settings})


def make_engine(
    *,
    num_blocks: int = 16,
    block_size: int = 4,
    max_len: int = 4096,
    overlaps: bool = False,
    grammars: GrammarCompiler | None = None,
    num_host_blocks: int = 0,
    **settings: object,
) -> tuple[Engine, FakeExecutor]:
    """An engine on a fake executor."""
    executor = FakeExecutor(
        num_blocks,
        block_size,
        max_position=max_len,
        overlaps=overlaps,
        num_host_blocks=num_host_blocks,
    )
    config = make_config(**settings)
    engine = WatchedEngine(
        config, executor, model_digest=DIGEST, clock=FakeClock(), grammars=grammars
    )
    return engine, executor


class MakeEngine(Protocol):
    """`make_engine` with an executor that overlaps, or one that does not; a fixture."""

    def __call__(
        self,
        *,
        num_blocks: int = 16,
        block_size: int = 4,
        max_len: int = 4096,
        grammars: GrammarCompiler | None = None,
        **settings: object,
    ) -> tuple[Engine, FakeExecutor]: ...


def make_request(
    request_id: str = "r",
    prompt_ids: Sequence[int] | int = 8,
    *,
    output_ids: Sequence[int] = (),
    prefill_only: bool = False,
    block_hashes: Sequence[bytes] | None = None,
    **sampling: object,
) -> EngineRequest:
    """A request; a number stands for a prompt of that many tokens."""
    if isinstance(prompt_ids, int):
        prompt_ids = [1 + i % (VOCAB_SIZE - 1) for i in range(prompt_ids)]
    ignore_eos = sampling.get("structured") is None
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": ignore_eos, **sampling})
    return EngineRequest(
        request_id=request_id,
        prompt_ids=prompt_ids,
        sampling=params,
        output_ids=output_ids,
        prefill_only=prefill_only,
        block_hashes=block_hashes,
    )


@dataclass
class Transcript:
    """Everything an engine said of each request, checked for order while it is collected."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, SequenceOutput] = field(default_factory=dict)

    def take(self, output: SequenceOutput) -> None:
        assert output.request_id not in self.ends, f"{output.request_id} spoke after its end"
        tokens = self.tokens.setdefault(output.request_id, [])
        start = self.starts.setdefault(output.request_id, output.first_index - len(tokens))
        if output.token_ids:
            assert output.first_index == start + len(tokens), "a token was lost or repeated"
        tokens.extend(output.token_ids)
        if output.finish_reason is not None:
            self.ends[output.request_id] = output


def step_until_preempted(engine: Engine) -> None:
    """Step until a sequence has lost its blocks; fails when none does."""
    for _ in range(200):
        if engine.stats().preemptions:
            return
        engine.step()
    raise AssertionError("nothing was preempted")


def run(engine: Engine, *, max_steps: int = 2000) -> Transcript:
    """Step until nothing is left; fails when it takes too long."""
    transcript = Transcript()
    for _ in range(max_steps):
        if not engine.has_work:
            return transcript
        for output in engine.step().outputs:
            transcript.take(output)
        engine.check_integrity()
    raise AssertionError(f"still at work after {max_steps} steps: {engine.stats()}")
