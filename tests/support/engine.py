"""Builders for engine tests, and an executor without a model that notices scheduling mistakes.

The KV of a token here is a number made from the KV of all tokens before it, *as read from the pool
through the block table*, and the next token is made from the KV of the whole context read the same
way. So a wrong block table, a stale block, a missing or repeated chunk, a block written by two
sequences or a wrong sampling position all change the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

from core.sampling import SamplingParams
from core.tokens import TokenLogprobs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import DoneStep, PendingStep
from engine.plan import Chunk, SampleSpec, StepPlan, StepResult
from engine.request import EngineRequest, SequenceOutput

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


def next_token(kv: Sequence[int], seed: int, position: int, banned: Sequence[int]) -> int:
    """The fake model: a token from the KV of the whole context and the sampling counter."""
    token = mix(*kv, seed, position) % VOCAB_SIZE
    while token in banned:
        token = (token + 1) % VOCAB_SIZE
    return token


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
        token_id = next_token(kv, sampling.seed, len(output), banned)
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

    def __post_init__(self) -> None:
        self.blocks = [[-1] * self.block_size for _ in range(self.num_blocks)]

    @property
    def layout(self) -> SimpleNamespace:
        return SimpleNamespace(block_size=self.block_size)

    def read(self, table: Sequence[int], length: int) -> list[int]:
        """KV of positions [0, length)."""
        size = self.block_size
        return [self.blocks[table[i // size]][i % size] for i in range(length)]


class FakeExecutor:
    """Implements `engine.executor.Executor`."""

    overlaps = False

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_position: int = 4096,
    ) -> None:
        self.pool = FakePool(num_blocks, block_size)
        self.model_digest = DIGEST
        self.model_config = SimpleNamespace(
            eos_token_ids=(EOS,),
            vocab_size=VOCAB_SIZE,
            max_position=max_position,
        )
        self.plans: list[StepPlan] = []
        self.fail_with: Exception | None = None
        self.closed = False

    def submit(self, plan: StepPlan) -> PendingStep:
        return DoneStep(self._execute(plan))

    def _execute(self, plan: StepPlan) -> StepResult:
        assert plan.chunks, "an empty plan was executed"
        self.plans.append(
            StepPlan([_copied(chunk.token_ids, chunk) for chunk in plan.chunks])  # tables are live
        )
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        written: set[tuple[int, int]] = set()
        sampled: list[int | None] = []
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.token_ids)
            size = self.pool.block_size
            assert len(chunk.block_table) == -(-end // size), "the table does not fit the chunk"
            context = self.pool.read(chunk.block_table, chunk.start)
            for offset, token_id in enumerate(chunk.token_ids):
                position = chunk.start + offset
                value = mix(*context[-1:], position, token_id)
                context.append(value)
                slot = (chunk.block_table[position // size], position % size)
                assert slot not in written, "two sequences write to one slot in a step"
                written.add(slot)
                self.pool.blocks[slot[0]][slot[1]] = value
        for chunk in plan.chunks:  # read after all writes: a step's chunks run together
            end = chunk.start + len(chunk.token_ids)
            context = self.pool.read(chunk.block_table, end)
            sampled.append(None if chunk.sample is None else _sample(context, chunk.sample))
        logprobs = [
            TokenLogprobs(-1.0)
            if chunk.sample is not None and chunk.sample.params.logprobs is not None
            else None
            for chunk in plan.chunks
        ]
        return StepResult(sampled, logprobs)

    def close(self) -> None:
        self.closed = True


def _sample(context: Sequence[int], spec: SampleSpec) -> int:
    assert spec.position == len(spec.output_ids), "the sampling counter is off"
    assert len(spec.prompt_ids) + len(spec.output_ids) == len(context)
    return next_token(context, spec.params.seed, spec.position, spec.banned_ids)


def _copied(token_ids: Sequence[int], chunk: Chunk) -> Chunk:
    return Chunk(
        chunk.request_id, list(token_ids), chunk.start, list(chunk.block_table), chunk.sample
    )


class FakeClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_config(**settings: object) -> EngineConfig:
    """A configuration with small limits."""
    return EngineConfig(**{"model": "fake", "max_step_tokens": 16, "max_num_seqs": 8, **settings})


def make_engine(
    *, num_blocks: int = 16, block_size: int = 4, max_len: int = 4096, **settings: object
) -> tuple[Engine, FakeExecutor]:
    """An engine on a fake executor."""
    executor = FakeExecutor(num_blocks, block_size, max_position=max_len)
    engine = Engine(make_config(**settings), executor, model_digest=DIGEST, clock=FakeClock())
    return engine, executor


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
    params = SamplingParams(**{"max_tokens": 8, "ignore_eos": True, **sampling})
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
