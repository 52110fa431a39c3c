"""What the engine itself costs per step: scheduling and bookkeeping, with nothing to compute.

    python -m benchmarks.engine_host_cost

Every sequence decodes, one token a step, on an executor that does nothing. On a GPU this time must
hide behind the step that the device runs meanwhile, so it has to stay well below 1 to 6 ms. Medians
of whole steps; half of the cost per sequence is planning, half taking the tokens in.
"""

import argparse
import gc
import time
from types import SimpleNamespace
from typing import Any, cast

from benchmarks.report import Report, median
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import DoneStep, PendingStep
from engine.plan import StepPlan, StepResult
from engine.request import EngineRequest

BATCHES = (1, 64, 256)
BLOCK_SIZE = 16
PROMPT_TOKENS = 512
WARM_UP_STEPS = 40


class IdleExecutor:
    """An Executor whose steps are done at once and always sample token 1."""

    model_digest = b"idle executor"

    def __init__(self, num_blocks: int, *, overlaps: bool) -> None:
        self.overlaps = overlaps
        self.pool = cast(
            Any,
            SimpleNamespace(
                num_blocks=num_blocks,
                layout=SimpleNamespace(block_size=BLOCK_SIZE),
                device_id=None,
                host_memory=None,
            ),
        )
        self.model_config = cast(
            Any, SimpleNamespace(max_position=1 << 20, vocab_size=1 << 17, eos_token_ids=(0,))
        )

    def submit(self, plan: StepPlan) -> PendingStep:
        """See Executor."""
        count = len(plan.chunks)
        return DoneStep(StepResult([1] * count, [None] * count))

    def close(self) -> None:
        """See Executor."""


def decoding_engine(batch: int, *, steps: int, overlaps: bool) -> Engine:
    """An engine whose `batch` sequences have been prefilled and decode for `steps` steps."""
    num_tokens = PROMPT_TOKENS + WARM_UP_STEPS + steps
    num_blocks = batch * (num_tokens // BLOCK_SIZE + 2) + 64
    config = EngineConfig(model="idle", max_num_seqs=batch, max_step_tokens=batch * PROMPT_TOKENS)
    executor = IdleExecutor(num_blocks, overlaps=overlaps)
    engine = Engine(config, executor, model_digest=executor.model_digest)
    for index in range(batch):
        engine.add(
            EngineRequest(
                request_id=f"r{index}",
                prompt_ids=[2 + index] * PROMPT_TOKENS,
                sampling=SamplingParams(max_tokens=1 << 20, temperature=0.6),
            )
        )
    for _ in range(WARM_UP_STEPS):
        engine.step()
    assert engine.stats().running == batch, "not everything runs"
    return engine


def step_us(batch: int, steps: int, *, overlaps: bool) -> list[float]:
    """Microseconds of each of `steps` decode steps."""
    engine = decoding_engine(batch, steps=steps, overlaps=overlaps)
    samples = []
    gc.collect()
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def main() -> None:
    """Measure each batch size with and without planning ahead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    report = Report("engine-host-cost", {"steps": arguments.steps, "batches": BATCHES})
    for overlaps in (False, True):
        for batch in BATCHES:
            samples = step_us(batch, arguments.steps, overlaps=overlaps)
            goal = "<= 1000" if batch == BATCHES[-1] else ""
            kind = "planned ahead" if overlaps else "one at a time"
            name = f"step of {batch} decodes, {kind}"
            report.add(name, median(samples), "us", samples=samples, goal=goal)
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
