"""An executor without a model that notices scheduling mistakes.

The KV of a token here is a number made from the KV of all tokens before it, *as read from the pool
through the block table*, and the next token is made from the KV of the whole context read the same
way. So a wrong block table, a stale block, a missing or repeated chunk, a block written by two
sequences or a wrong sampling position all change the tokens.

It computes a step while it is submitted or, if it overlaps, at any time between that and the
return of `wait`: as late as possible unless told to. What a step will write is spoilt when it is
submitted.
"""

from collections import deque
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Literal

from core.sampling import SamplingParams
from core.tokens import PromptLogprobs, TokenLogprobs
from engine.executor import PendingStep
from engine.plan import PENDING, Chunk, SampleSpec, ScoreSpec, StepPlan, StepResult
from tests.support.grammar import ReadMask, allowed_by, rule_of
from tests.support.host_memory import POISON, FakeHostMemory

VOCAB_SIZE = 97
EOS = 0
DIGEST = b"fake model"
_MASK = (1 << 61) - 1


def mix(*values: int) -> int:
    """A deterministic hash of integers, the same in every process."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = ((state ^ value) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & _MASK
        state ^= state >> 29
    return state


def next_token(
    kv: Sequence[int],
    seed: int,
    position: int,
    banned: Sequence[int],
    allowed: Container[int] = range(VOCAB_SIZE),
) -> int:
    """The fake model: a token from the KV of the whole context and the sampling counter."""
    first = mix(*kv, seed, position) % VOCAB_SIZE
    for token in (*range(first, VOCAB_SIZE), *range(first)):
        if token not in banned and token in allowed:
            return token
    raise AssertionError("no token is allowed")


def kv_of(token_ids: Sequence[int]) -> list[int]:
    """KV of every token of a context."""
    kv: list[int] = []
    for token_id in token_ids:
        kv.append(mix(*kv[-1:], len(kv), token_id))
    return kv


def undisturbed(
    prompt_ids: Sequence[int], sampling: SamplingParams, *, max_len: int = 10**9
) -> list[int]:
    """What a sequence generates alone, with no pool, no blocks and no scheduler."""
    kv = kv_of(prompt_ids)
    ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else {EOS})
    output: list[int] = []
    while True:
        banned = tuple(ends) if len(output) < sampling.min_tokens else ()
        allowed: Container[int] = range(VOCAB_SIZE)
        if sampling.structured is not None:
            allowed = rule_of(sampling.structured).allowed(output)
            banned = banned if set(allowed) - set(banned) else ()
        token_id = next_token(kv, sampling.seed, len(output), banned, allowed)
        output.append(token_id)
        full = len(prompt_ids) + len(output) >= max_len
        if token_id in ends or len(output) >= sampling.max_tokens or full:
            return output
        kv.append(mix(*kv[-1:], len(kv), token_id))


@dataclass
class FakePool:
    """Blocks of numbers, one per token."""

    num_blocks: int
    block_size: int
    blocks: list[list[int]] = field(init=False)
    device_id: int | None = None
    host_memory: FakeHostMemory | None = None

    def __post_init__(self) -> None:
        self.blocks = [[-1] * self.block_size for _ in range(self.num_blocks)]

    @property
    def layout(self) -> SimpleNamespace:
        return SimpleNamespace(block_size=self.block_size)

    def read(self, table: Sequence[int], length: int) -> list[int]:
        """KV of positions [0, length)."""
        size = self.block_size
        return [self.blocks[table[i // size]][i % size] for i in range(length)]


@dataclass
class FakeStep:
    """A PendingStep. `plan` is a copy: the engine's own lists, in `live`, change."""

    executor: "FakeExecutor"
    plan: StepPlan
    live: StepPlan
    before: "FakeStep | None"
    error: BaseException | None
    result: StepResult | None = None

    def wait(self) -> StepResult:
        return self.executor.finish(self)

    def before_chunk(self, chunk: Chunk) -> Chunk | None:
        """What this step computes of the sequence that `chunk` of the next plan is of.

        A request of the same name has another table.
        """
        pairs = zip(self.live.chunks, self.plan.chunks, strict=True)
        return next((own for live, own in pairs if live.block_table is chunk.block_table), None)

    def sampled(self, request_id: str) -> int:
        """The token that this step sampled for a request; anything at all if it failed."""
        if self.error is not None:
            return 1
        assert self.result is not None, "steps are computed in order"
        names = [chunk.request_id for chunk in self.plan.chunks]
        token_id = self.result.token_ids[names.index(request_id)]
        assert token_id is not None
        return token_id


class FakeExecutor:
    """Implements `engine.executor.Executor`."""

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_position: int = 4096,
        overlaps: bool = False,
        num_host_blocks: int = 0,
    ) -> None:
        self.pool = FakePool(num_blocks, block_size)
        if num_host_blocks:
            self.pool.host_memory = FakeHostMemory(self.pool.blocks, num_host_blocks)
        self.overlaps = overlaps
        self.model_digest = DIGEST
        self.model_config = SimpleNamespace(
            eos_token_ids=(EOS,),
            vocab_size=VOCAB_SIZE,
            max_position=max_position,
        )
        self.plans: list[StepPlan] = []
        self.fail_with: BaseException | None = None
        """Raised by the next step, once."""
        self.fail_at: Literal["submit", "wait"] = "submit"
        self.in_flight: deque[FakeStep] = deque()
        """Submitted and not waited for."""
        self.broken: AssertionError | None = None
        """A rule that the engine broke; it takes the error itself for a failure of the device."""
        self.closed = False
        self.ranks = None

    def submit(self, plan: StepPlan) -> PendingStep:
        with self._notices():
            return self._submit(plan)

    @contextmanager
    def _notices(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.broken = error
            raise

    def _submit(self, plan: StepPlan) -> PendingStep:
        assert plan.chunks, "an empty plan was executed"
        assert len(self.in_flight) <= self.overlaps, "too many steps at once"
        before = self.in_flight[-1] if self.in_flight else None
        live, plan = plan, _copied(plan)
        self.plans.append(plan)
        error, self.fail_with = self.fail_with, None
        if error is not None and self.fail_at == "submit":
            raise error
        for chunk in live.chunks:
            _check_pending(chunk, before and before.before_chunk(chunk))
        for block_id, offset in self._slots(plan):
            self.pool.blocks[block_id][offset] = POISON
        step = FakeStep(self, plan, live, before, error)
        self.in_flight.append(step)
        if not self.overlaps:
            self.run_device()
        return step

    def run_device(self) -> None:
        """Compute the oldest step that is not computed yet."""
        for step in self.in_flight:
            if step.result is None and step.error is None:
                step.result = self._compute(step)
                return

    def finish(self, step: FakeStep) -> StepResult:
        """What `step.wait` does."""
        with self._notices():
            assert self.in_flight and self.in_flight[0] is step, "waited for out of order, or twice"
            if step.result is None:
                self.run_device()
        self.in_flight.popleft()
        if step.error is not None:
            raise step.error
        assert step.result is not None
        return step.result

    def _slots(self, plan: StepPlan) -> set[tuple[int, int]]:
        """Block and offset of every token that a plan computes."""
        size = self.pool.block_size
        slots: set[tuple[int, int]] = set()
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            assert len(chunk.block_table) == -(-end // size), "the table does not fit the chunk"
            for position in range(chunk.start, end):
                slot = (chunk.block_table[position // size], position % size)
                assert slot not in slots, "two sequences write to one slot in a step"
                slots.add(slot)
        return slots

    def _compute(self, step: FakeStep) -> StepResult:
        size, chunks = self.pool.block_size, step.plan.chunks
        for chunk in chunks:
            context = self.pool.read(chunk.block_table, chunk.start)
            for position, token_id in enumerate(_token_ids(chunk, step.before), chunk.start):
                context.append(mix(*context[-1:], position, token_id))
                self.pool.blocks[chunk.block_table[position // size]][position % size] = context[-1]
        sampled: list[int | None] = []
        for chunk in chunks:  # read after all writes: a step's chunks run together
            context = self.pool.read(chunk.block_table, chunk.start + len(chunk.token_ids))
            sampled.append(None if chunk.sample is None else _sample(context, chunk.sample))
        logprobs = [
            TokenLogprobs(-1.0)
            if chunk.sample is not None and chunk.sample.params.logprobs is not None
            else None
            for chunk in chunks
        ]
        scores = {
            index: _scores(
                self.pool.read(chunk.block_table, chunk.start + len(chunk.token_ids)), spec
            )
            for index, chunk in enumerate(chunks)
            if (spec := chunk.score) is not None
        }
        return StepResult(sampled, logprobs, scores)

    def close(self) -> None:
        assert self.broken is None
        assert not self.in_flight, "closed with a step in flight"
        self.closed = True


def _check_pending(chunk: Chunk, past: Chunk | None) -> None:
    """The token that the step in flight samples is named PENDING, and no other one is."""
    ends_at = None if past is None else past.start + len(past.token_ids)
    unknown = past is not None and past.sample is not None and chunk.start == ends_at
    assert (PENDING in chunk.token_ids) is unknown, "PENDING, and nobody samples it"
    assert not unknown or len(chunk.token_ids) == 1, "PENDING is not alone"
    assert past is None or chunk.start == ends_at, "tokens were left out or are computed twice"
    if chunk.sample is not None:
        spec = chunk.sample
        assert spec.position == len(spec.output_ids) + unknown, "the sampling counter is off"
        assert not (unknown and spec.params.penalised), "penalties without the whole history"


def _token_ids(chunk: Chunk, before: FakeStep | None) -> Sequence[int]:
    if PENDING not in chunk.token_ids:
        return chunk.token_ids
    assert before is not None
    return [before.sampled(chunk.request_id)]


def score_of(context: int, token_id: int) -> float:
    """Log probability of a prompt token after what a KV entry stands for."""
    return -float(mix(context, token_id))


def _scores(context: Sequence[int], spec: ScoreSpec) -> PromptLogprobs:
    values = [
        score_of(context[position - 1], token_id)
        for position, token_id in enumerate(spec.token_ids, spec.first)
    ]
    return PromptLogprobs(first=spec.first, logprobs=values, ranks=[1] * len(values))


def _sample(context: Sequence[int], spec: SampleSpec) -> int:
    assert len(spec.prompt_ids) + spec.position == len(context)
    allowed: Container[int] = range(VOCAB_SIZE)
    if spec.mask is not None:
        allowed = allowed_by(spec.mask.words())
    return next_token(context, spec.params.seed, spec.position, spec.banned_ids, allowed)


def _copied(plan: StepPlan) -> StepPlan:
    return StepPlan(
        [
            Chunk(
                chunk.request_id,
                list(chunk.token_ids),
                chunk.start,
                list(chunk.block_table),
                chunk.sample and _copied_spec(chunk.sample),
                chunk.score,
            )
            for chunk in plan.chunks
        ]
    )


def _copied_spec(spec: SampleSpec) -> SampleSpec:
    mask = None if spec.mask is None else ReadMask(spec.mask.words())
    return replace(spec, output_ids=list(spec.output_ids), mask=mask)
