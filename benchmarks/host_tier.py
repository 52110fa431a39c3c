"""TTFT of a prompt whose KV comes back from host memory, beside computing it and having it.

    python -m benchmarks.host_tier
    python -m benchmarks.host_tier --shape llama-3.1-8b --device cuda --prompts 1024 8192 32768 \
        --host-gib 16

One engine in a plain loop. The pool holds little more than two prompts, so that two others push
the one that is measured out into host memory. In turns, it is computed, found in the pool, and
brought back; its first token is the same when found and when brought back, or the run fails.
"""

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.gpu_shapes import SHAPES
from benchmarks.report import Report, median
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.llm import LLM

BLOCK_SIZE = 16
GIB = 1 << 30
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0)
KINDS = ("computed", "found in the pool", "brought back")


class Measured:
    """One engine, sized for prompts of one length."""

    def __init__(self, config: EngineConfig, num_tokens: int) -> None:
        self._llm = LLM(config)
        self._num_tokens = num_tokens
        self._prompts = [self._prompt(number) for number in range(3)]
        for prompt in self._prompts:  # compile and warm up whatever a first step does
            self.ttft_s(prompt)

    def ttft_s(self, prompt: list[int]) -> tuple[float, int, int]:
        """Seconds to the first token, that token, and how many tokens were cached."""
        began_at = time.perf_counter()
        (done,) = self._llm.generate([prompt], FIRST_TOKEN)
        return time.perf_counter() - began_at, done.token_ids[0], done.num_cached_tokens

    def round(self) -> dict[str, float]:
        """Each kind once.

        Raises:
            SystemExit: a token differs, or the prompt did not come back.
        """
        prompt, *others = self._prompts
        self._llm.engine.flush_cache()
        computed_s, _, _ = self.ttft_s(prompt)
        found_s, found, found_tokens = self.ttft_s(prompt)
        for other in others:
            self._settle()
            self.ttft_s(other)
        before = self._llm.engine.stats().host.hit_tokens
        back_s, back, back_tokens = self.ttft_s(prompt)
        loaded = self._llm.engine.stats().host.hit_tokens - before
        if back != found or back_tokens != found_tokens or loaded < self._num_tokens // 2:
            raise SystemExit(f"{loaded} tokens came back, first token {back} and not {found}")
        return dict(zip(KINDS, (computed_s, found_s, back_s), strict=True))

    def bytes_per_s(self) -> float:
        """Of copies, as the engine measured it."""
        return self._llm.engine.stats().host.bytes_per_s

    def close(self) -> None:
        """Free everything."""
        self._llm.close()

    def _prompt(self, number: int) -> list[int]:
        vocabulary = self._llm.engine.vocab_size
        return [(number * 7 + i * 31) % (vocabulary - 3) + 3 for i in range(self._num_tokens)]

    def _settle(self) -> None:
        """Let copies out catch up: a worker that is not overrun has time for it."""
        for _ in range(200):
            self._llm.engine.tend()
            time.sleep(0.001)
            if not self._llm.engine.stats().host.held_blocks:
                return


def main() -> None:
    """Measure each length of prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--host-gib", type=float, default=1.0, help="host memory, in GiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="keep the figures in results/")
    arguments = parser.parse_args()
    report = Report(f"host-tier-{arguments.shape or arguments.model}", vars(arguments))
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if arguments.shape:
            model = str(SHAPES[arguments.shape].write(Path(folder)))
        for num_tokens in arguments.prompts:
            blocks = -(-num_tokens // BLOCK_SIZE)
            config = EngineConfig(
                model=model,
                load_format="dummy" if arguments.shape else "auto",
                device=arguments.device,
                block_size=BLOCK_SIZE,
                num_blocks=2 * blocks + blocks // 4 + 2,
                host_kv_bytes=int(arguments.host_gib * GIB),
            )
            measure(report, config, num_tokens, arguments.rounds)
    if arguments.save:
        print(report.save())


def measure(report: Report, config: EngineConfig, num_tokens: int, rounds: int) -> None:
    """Add the figures of one length."""
    measured = Measured(config, num_tokens)
    try:
        samples: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(rounds):
            for kind, seconds in measured.round().items():
                samples[kind].append(seconds)
        for kind, each in samples.items():
            milliseconds = [1e3 * seconds for seconds in each]
            report.add(f"TTFT of {num_tokens}, {kind}", median(milliseconds), "ms",
                       samples=milliseconds)  # fmt: skip
        computed, _, back = (median(samples[kind]) for kind in KINDS)
        report.add(f"brought back / computed, {num_tokens}", back / computed, "x", goal="< 1")
        report.add(f"copies beside {num_tokens}", measured.bytes_per_s() / 1e9, "GB/s")
    finally:
        measured.close()


if __name__ == "__main__":
    main()
