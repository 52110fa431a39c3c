"""Random lives of an engine with a tiny pool: nothing leaks, and every token is the right one.

With an executor that overlaps, the device gets on with what it was given whenever a rule says so.
"""

from dataclasses import replace
from typing import Literal

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from core.block_hash import hash_blocks, root_hash
from core.errors import InvalidRequestError, OverloadedError
from core.finish import FinishReason
from engine.request import EngineRequest, Reservation, StepOutputs
from tests.support.engine import FakeClock, Transcript, WatchedEngine, make_config, make_request
from tests.support.fake_executor import DIGEST, FakeExecutor, kv_of, undisturbed
from tests.support.grammar import HeldCompiler, structure

BLOCK_SIZE = 4

prompts = st.builds(
    lambda stem, length, tail: [stem] * length + tail,
    st.integers(1, 2),
    st.sampled_from([1, 3, 4, 8, 8, 11, 12, 16]),
    st.sampled_from([[], [], [3], [3, 2, 1, 1]]),
)
lengths = st.sampled_from([1, 2, 3, 5, 8, 13, 21, 30])


class EngineMachine(RuleBasedStateMachine):
    """The model is a dict of expected outputs; whatever the engine does, it must produce those."""

    requests = Bundle("requests")
    reservations = Bundle("reservations")
    holds = Bundle("holds")

    @initialize(
        num_blocks=st.integers(5, 12),
        max_step_tokens=st.integers(2, 16),
        max_chunk_tokens=st.sampled_from([None, 1, 5]),
        max_num_seqs=st.integers(1, 4),
        prefix_caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(["fcfs", "longest_prefix"]),
        overlaps=st.sampled_from([False, True, True]),
        num_host_blocks=st.sampled_from([0, 1, 3, 8, 20]),
    )
    def start(
        self, num_blocks: int, overlaps: bool, num_host_blocks: int, **limits: object
    ) -> None:
        self.executor = FakeExecutor(
            num_blocks, BLOCK_SIZE, overlaps=overlaps, num_host_blocks=num_host_blocks
        )
        self.clock = FakeClock()
        config = make_config(max_waiting=4, **limits)
        self.grammars = HeldCompiler(clock=self.clock)
        self.engine = WatchedEngine(
            config,
            self.executor,
            model_digest=DIGEST,
            clock=self.clock,
            grammars=self.grammars,
        )
        self.transcript = Transcript()
        self.prompts: dict[str, list[int]] = {}
        self.expected: dict[str, list[int]] = {}
        self.aborted: set[str] = set()
        self.held: dict[int, list[tuple[int, list[int]]]] = {}
        self.imports: dict[str, tuple[EngineRequest, Reservation]] = {}
        self.known_hashes: set[bytes] = set()
        self.host_hashes: set[bytes] = set()
        self.count = 0

    def new_request(
        self, prompt: list[int], max_tokens: int, seed: int, done: int, **kind: object
    ) -> EngineRequest:
        self.count += 1
        request = make_request(
            f"r{self.count}",
            prompt,
            max_tokens=max_tokens,
            seed=seed,
            ignore_eos=seed in (0, 2),
            structured=structure(max_tokens * 3 // 4) if seed >= 4 else None,
            stop_token_ids=tuple(range(5)) if seed == 1 else (),
            min_tokens=min(2, max_tokens),
            presence_penalty=1.0 if seed in (3, 5) else 0.0,
            **kind,
        )
        expected = undisturbed(prompt, request.sampling, max_len=self.engine.max_model_len)
        done = min(done, len(expected) - 1)
        request = replace(request, output_ids=expected[:done])
        if request.prefill_only:
            expected = expected[: done + 1]
        self.prompts[request.request_id] = prompt
        self.expected[request.request_id] = expected
        self.transcript.tokens[request.request_id] = list(request.output_ids)
        return request

    def forget(self, request: EngineRequest) -> None:
        del self.expected[request.request_id]

    @rule(
        target=requests,
        burst=st.lists(
            st.fixed_dictionaries(
                {
                    "prompt": prompts,
                    "max_tokens": lengths,
                    "seed": st.integers(0, 5),
                    "done": st.sampled_from([0, 0, 0, 1, 5]),
                    "prefill_only": st.sampled_from([False, False, True]),
                }
            ),
            min_size=1,
            max_size=4,
        ),
        with_hashes=st.booleans(),
    )
    def add(self, burst: list[dict[str, object]], with_hashes: bool) -> object:
        added = [self.add_one(with_hashes, **each) for each in burst]
        return multiple(*(request_id for request_id in added if request_id))

    def add_one(self, with_hashes: bool, **each: object) -> str | None:
        request = self.new_request(**each)
        if with_hashes:
            tokens = [*request.prompt_ids, *request.output_ids]
            hashes = hash_blocks(tokens, BLOCK_SIZE, root_hash(DIGEST))
            request = replace(request, block_hashes=hashes)
        try:
            self.engine.add(request)
        except OverloadedError:
            assert self.engine.stats().waiting >= 4
            self.forget(request)
            return None
        except InvalidRequestError:
            assert len(request.prompt_ids) + len(request.output_ids) >= self.engine.max_model_len
            self.forget(request)
            return None
        return request.request_id

    @rule(request_id=requests, really=st.sampled_from([False, False, True]))
    def abort(self, request_id: str, really: bool) -> None:
        if not really:
            return
        was_live = request_id not in self.transcript.ends and request_id not in self.aborted
        assert self.engine.abort(request_id) is was_live
        if was_live:
            self.aborted.add(request_id)

    @rule(count=st.sampled_from([1, 1, 2, 4, 12]), waited_s=st.sampled_from([0.0, 0.0, 5.0]))
    def steps(self, count: int, waited_s: float) -> None:
        self.clock.now += waited_s
        for _ in range(count):
            self.step()
            self.engine.check_integrity()

    def step(self) -> None:
        self.take(self.engine.step())

    @rule()
    def one_step(self) -> None:
        self.step()

    @rule(really=st.sampled_from([False, False, False, True]))
    def settle(self, really: bool) -> None:
        if not really:
            return
        for outputs in self.engine.settle():
            self.take(outputs)

    @rule()
    def compile_grammars(self) -> None:
        self.grammars.release()

    @rule()
    def run_device(self) -> None:
        self.executor.run_device()

    @rule(num_blocks=st.sampled_from([1, 2, 9]), delay=st.sampled_from([0, 1, 4, 30]))
    def run_copies(self, num_blocks: int, delay: int) -> None:
        """Copies to and from host memory get on; those to come take longer or less long."""
        memory = self.executor.pool.host_memory
        if memory is not None:
            memory.run(num_blocks)
            memory.delay = delay

    @rule()
    def tend(self) -> None:
        self.engine.tend()

    @rule(really=st.sampled_from([False, False, False, True]))
    def fail_copies(self, really: bool) -> None:
        memory = self.executor.pool.host_memory
        if memory is not None:
            memory.fails = really and self.count % 4 == 0

    def take(self, outputs: StepOutputs) -> None:
        for output in outputs.outputs:
            self.transcript.take(output)
            if output.finish_reason is FinishReason.HANDED_OVER:
                self.check_export(output.request_id, output.num_computed)

    def check_export(self, request_id: str, num_computed: int) -> None:
        """The blocks of a finished prompt are there, and right, until the next step."""
        table = self.engine.block_table(request_id)
        assert self.engine.num_computed(request_id) == num_computed
        tokens = [*self.prompts[request_id], *self.transcript.tokens[request_id][:-1]]
        assert self.executor.pool.read(table, num_computed) == kv_of(tokens)

    @rule(
        really=st.sampled_from([False, False, False, True]),
        fail_at=st.sampled_from(["submit", "wait"]),
    )
    def fail_a_step(self, really: bool, fail_at: Literal["submit", "wait"]) -> None:
        if not really:
            return
        self.executor.fail_with, self.executor.fail_at = RuntimeError("out of luck"), fail_at
        self.step()
        self.executor.fail_with = None

    @rule(target=holds, request_id=requests)
    def hold(self, request_id: str) -> object:
        try:
            complete = self.engine.num_computed(request_id) // BLOCK_SIZE
        except KeyError:
            return multiple()
        blocks = list(self.engine.block_table(request_id)[:complete])
        if not blocks:
            return multiple()
        self.engine.hold(blocks)
        self.count += 1
        content = [list(self.executor.pool.blocks[block_id]) for block_id in blocks]
        self.held[self.count] = list(zip(blocks, content, strict=True))
        return self.count

    @rule(number=consumes(holds))
    def release(self, number: int) -> None:
        self.engine.release([block_id for block_id, _ in self.held.pop(number)])

    @rule(
        target=reservations,
        prompt=prompts,
        max_tokens=lengths,
        seed=st.integers(0, 5),
        done=st.sampled_from([0, 0, 3]),
    )
    def reserve(self, prompt: list[int], max_tokens: int, seed: int, done: int) -> object:
        request = self.new_request(prompt, max_tokens, seed, done)
        try:
            reservation = self.engine.reserve(request)
        except InvalidRequestError:
            self.forget(request)
            return multiple()
        if reservation is None:
            self.forget(request)
            return multiple()
        self.imports[request.request_id] = (request, reservation)
        return reservation

    @rule(target=requests, reservation=consumes(reservations))
    def adopt(self, reservation: Reservation) -> str:
        request, _ = self.imports.pop(reservation.request_id)
        tokens = [*request.prompt_ids, *request.output_ids]
        kv = kv_of(tokens)
        table, cached = reservation.block_table, reservation.num_cached_blocks
        assert (
            self.executor.pool.read(table[:cached], cached * BLOCK_SIZE)
            == (kv[: cached * BLOCK_SIZE])
        )
        for position in range(cached * BLOCK_SIZE, len(tokens)):
            self.executor.pool.blocks[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = kv[
                position
            ]
        first = self.expected[request.request_id][len(request.output_ids)]
        self.transcript.take(self.engine.adopt(reservation, first))
        return request.request_id

    @rule(reservation=consumes(reservations))
    def cancel(self, reservation: Reservation) -> None:
        self.engine.cancel(reservation)
        self.engine.cancel(reservation)
        self.forget(self.imports.pop(reservation.request_id)[0])

    @rule()
    def flush(self) -> None:
        assert self.engine.flush_cache() >= 0
        assert self.engine.stats().cached_blocks == 0
        assert self.engine.stats().host.cached_blocks == 0

    @precondition(lambda self: hasattr(self, "engine"))
    @invariant()
    def pool_is_balanced(self) -> None:
        self.engine.check_integrity()
        stats = self.engine.stats()
        assert stats.free_blocks + stats.cached_blocks + stats.held_blocks == stats.total_blocks
        change = self.engine.drain_cache_changes()
        assert not self.known_hashes & set(change.stored)
        assert self.known_hashes >= set(change.removed)
        self.known_hashes |= set(change.stored)
        self.known_hashes -= set(change.removed)
        assert self.known_hashes == set(self.engine.cached_hashes())
        host = stats.host
        assert host.free_blocks + host.cached_blocks + host.held_blocks == host.total_blocks
        assert not self.host_hashes & set(change.host_stored)
        assert self.host_hashes >= set(change.host_removed)
        self.host_hashes |= set(change.host_stored)
        self.host_hashes -= set(change.host_removed)
        assert self.host_hashes == set(self.engine.host_hashes())

    @precondition(lambda self: hasattr(self, "engine"))
    @invariant()
    def held_blocks_do_not_change(self) -> None:
        for pairs in self.held.values():
            for block_id, content in pairs:
                assert self.executor.pool.blocks[block_id] == content

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for number in list(self.held):
            self.release(number)
        for request, reservation in self.imports.values():
            self.engine.cancel(reservation)
            self.forget(request)
        self.grammars.release()
        for _ in range(2000):
            for _ in range(40 if not self.engine.has_work else 0):
                self.engine.tend()  # a copy that nobody waits for any more may be in the way
            if not self.engine.has_work:
                break
            self.step()
            self.pool_is_balanced()
        stats = self.engine.stats()
        assert (stats.waiting, stats.running, stats.held_blocks) == (0, 0, 0)
        for _ in range(100):
            self.engine.tend()
        self.pool_is_balanced()
        for request_id, expected in self.expected.items():
            tokens = self.transcript.tokens[request_id]
            end = self.transcript.ends.get(request_id)
            assert (end is None) == (request_id in self.aborted), f"{request_id} ended {end}"
            if end is None or end.finish_reason is FinishReason.FAILED:
                assert tokens == expected[: len(tokens)]
            else:
                assert tokens == expected


EngineMachine.TestCase.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestEngineMachine = EngineMachine.TestCase
