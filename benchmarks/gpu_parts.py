"""Times one model on one GPU through `engine.llm`: raw samples, no judgement.

    python -m benchmarks.gpu_parts llama-3.1-8b steps steady --json FILE

A process of its own per model, so that the next one, or another engine, has the whole GPU. The file
is written anew after each part: a process that is ended early leaves what it has.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_profile import record, summary
from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_workloads import WORKLOADS
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.llm import LLM
from engine.request import EngineRequest

PARTS = ("offline", "steps", "steady")


class ModelRun:
    """One model, loaded, and what was measured of it."""

    def __init__(self, name: str, device: str, folder: Path) -> None:
        """Make the model's folder in `folder` and load it with random weights."""
        self.work = work = WORKLOADS[name]
        self._vocab_size = SHAPES[name].vocab_size
        self._device = device
        on_gpu = device.startswith("cuda")
        dtype: Literal["bfloat16", "float32"] = "bfloat16" if on_gpu else "float32"
        begun = time.perf_counter()
        self.llm = LLM(
            EngineConfig(
                model=str(SHAPES[name].write(folder / name, dtype)),
                load_format="dummy",
                dtype=dtype,
                device=device,
                max_model_len=work.max_model_len,
                max_num_seqs=work.max_num_seqs,
                max_step_tokens=work.max_step_tokens,
                gpu_memory_utilization=work.memory_share,
                kv_cache_bytes=None if on_gpu else 16 << 20,
                prefix_caching=False,
            )
        )
        self.result: dict[str, Any] = {
            "model": name,
            "start_s": time.perf_counter() - begun,
            "num_blocks": self.llm.engine.pool.num_blocks,
        }
        self._once(1, 16, 8)

    def offline(self, repeats: int) -> None:
        """All requests at once; one full run before those that count."""
        assert self.work.offline is not None, "no offline workload for this model"
        prompts, outputs = self.work.offline.draw()
        sampling = [
            SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=tokens, seed=index)
            for index, tokens in enumerate(outputs)
        ]
        runs = [self._timed(prompts, sampling) for _ in range(1 + repeats)]
        self.result["offline"] = [{"seconds": s, "tokens": tokens} for s, tokens in runs[1:]]

    def steps(self, repeats: int) -> None:
        """Decode steps as (time for n + 1 tokens - time for 1) / n, then whole prompts."""
        work = self.work
        found = self.result["decode"] = {}
        self._once(1, work.decode_context, 2)
        for batch in work.decode_batches:
            self._once(batch, 16, 8)
            found[str(batch)] = {
                "long_s": self._repeated(
                    repeats, batch, work.decode_context, work.decode_steps + 1
                ),
                "short_s": self._repeated(repeats, batch, work.decode_context, 1),
            }
        self._once(1, work.prefill_tokens, 1)
        self.result["prefill_s"] = self._repeated(repeats + 2, 1, work.prefill_tokens, 1)

    def steady(self, repeats: int) -> None:
        """Decode with every sequence under way: seconds per step, then a profile of as many."""
        found = self.result["steady"] = {}
        for batch, context in self.work.steady:
            found[str(batch)] = {"context": context, **self._steady(batch, context)}

    def _steady(self, batch: int, context: int) -> dict[str, Any]:
        engine, steps = self.llm.engine, self.work.steady_steps
        names = [f"steady-{batch}-{index}" for index in range(batch)]
        for index, name in enumerate(names):
            sampling = SamplingParams(
                temperature=0.6, ignore_eos=True, max_tokens=4 * steps, seed=index
            )
            engine.add(
                EngineRequest(request_id=name, prompt_ids=self._prompt(context), sampling=sampling)
            )
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in engine.step().outputs}
        for _ in range(5):
            engine.step()
        times = [time.perf_counter()]
        for _ in range(steps):
            engine.step()
            times.append(time.perf_counter())
        kernels = record(lambda: [engine.step() for _ in range(steps)], self._device)
        for name in names:
            engine.abort(name)
        engine.settle()
        engine.reap()
        return {
            "step_s": [later - start for start, later in pairwise(times)],
            "profile": summary(kernels, steps),
        }

    def _repeated(self, repeats: int, batch: int, length: int, tokens: int) -> list[float]:
        return [self._once(batch, length, tokens) for _ in range(repeats)]

    def _once(self, batch: int, length: int, tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens)
        return self._timed([self._prompt(length) for _ in range(batch)], sampling)[0]

    def _prompt(self, length: int) -> list[int]:
        return random.choices(range(min(100_000, self._vocab_size)), k=length)

    def _timed(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> tuple[float, int]:
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, sampling)
        seconds = time.perf_counter() - start
        return seconds, sum(len(output.token_ids) for output in outputs)


def main() -> None:
    """Load, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", choices=WORKLOADS)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = ModelRun(arguments.model, arguments.device, Path(folder))
        for part in arguments.parts:
            getattr(run, part)(arguments.repeats)
            arguments.json.write_text(json.dumps(run.result))
        run.llm.close()


if __name__ == "__main__":
    main()
