"""What the hand-over from prefill to decode costs one request, through the whole system.

    python -m benchmarks.gpu_handover [--save] [--lengths 512 4096 32768] [--requests 30]

`diptych serve` with one prefill and one decode worker, random weights. First concurrent requests of
random lengths, so that free blocks lie scattered in both pools; then single requests of each length
on the idle system. Hand-over is what the router saw between the first token and the second, without
the first decode step: the last READs, the commit, waiting for the step, and the way of both tokens
to the router (stages transfer, decode_queue and handover_rpc of the timeline).
"""

import argparse
import asyncio
import random
import shlex
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.dummy_tokenizer import write_tokenizer
from benchmarks.gpu_shapes import SHAPES
from benchmarks.report import Report, median
from benchmarks.serving import Streamed, served_system, stream

GOALS_MS = {4096: "<= 5", 32_768: "<= 15"}
OUTPUT_TOKENS = 8
WARM_UP_REQUESTS = 64
STAGES = ("transfer", "decode_queue", "handover_rpc", "first_decode")
_HANDOVER = STAGES[:3]


async def warm_up(client: httpx.AsyncClient, vocab_size: int, longest: int) -> None:
    """Traffic of mixed lengths that leaves both pools in disorder."""
    rng = random.Random(0)

    async def one() -> None:
        prompt = rng.choices(range(vocab_size), k=rng.randint(64, longest))
        await stream(client, prompt, rng.randint(2, 64))

    await asyncio.gather(*(one() for _ in range(WARM_UP_REQUESTS)))


async def timeline(client: httpx.AsyncClient, request_id: str) -> dict[str, Any]:
    """What the router remembers of a request of one sequence."""
    answer = await client.get(f"/v1/requests/{request_id}/timeline")
    answer.raise_for_status()
    (sequence,) = answer.json()["sequences"]
    return dict(sequence)


async def measure(
    report: Report, url: str, vocab_size: int, lengths: list[int], requests: int
) -> None:
    """Warm up, then one request after the other."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await warm_up(client, vocab_size, min(4096, max(lengths)))
        for length in lengths:
            runs: list[tuple[Streamed, dict[str, Any]]] = []
            for _ in range(requests + 1):
                prompt = random.choices(range(vocab_size), k=length)
                streamed = await stream(client, prompt, OUTPUT_TOKENS)
                runs.append((streamed, await timeline(client, streamed.request_id)))
            add_figures(report, length, runs[1:])


def add_figures(report: Report, length: int, runs: list[tuple[Streamed, dict[str, Any]]]) -> None:
    """Figures of one length. Requests that were not handed over are only counted."""
    handed = [(seen, line) for seen, line in runs if line["mode"] == "disaggregated"]
    title = f"{length} tokens"
    report.add(f"{title}: handed over", len(handed) / len(runs), "x", goal=">= 1")
    if not handed:
        return
    ttft = [1e3 * (seen.times[1] - seen.times[0]) for seen, _ in handed]
    gap = [1e3 * (seen.times[2] - seen.times[1]) for seen, _ in handed]
    stages = {
        name: [
            1e3 * sum(stage["seconds"] for stage in line["stages"] if stage["name"] == name)
            for _, line in handed
        ]
        for name in STAGES
    }
    total = [sum(parts) for parts in zip(*(stages[name] for name in _HANDOVER), strict=True)]
    report.add(f"{title}: time to first token", median(ttft), "ms", samples=ttft)
    report.add(f"{title}: first to second token, at the client", median(gap), "ms", samples=gap)
    goal = GOALS_MS.get(length, "")
    report.add(f"{title}: hand-over, p50", median(total), "ms", samples=total, goal=goal)
    report.add(f"{title}: hand-over, p99", sorted(total)[int(0.99 * len(total))], "ms")
    for name, values in stages.items():
        report.add(f"{title}: {name}", median(values), "ms", samples=values)


def main() -> None:
    """Serve, measure, perhaps save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 32_768])
    parser.add_argument("--requests", type=int, default=30, help="of each length")
    parser.add_argument("--serve", default="", help="more options of `diptych serve`, one string")
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    parser.add_argument("--out", type=Path, help="keep it in this folder")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    settings = {key: getattr(arguments, key) for key in ("model", "lengths", "requests", "serve")}
    report = Report("gpu-handover", settings, gpu=gpu())
    with tempfile.TemporaryDirectory() as name:
        folder = shape.write(Path(name) / arguments.model)
        write_tokenizer(folder, shape.vocab_size)
        options = ["--model", str(folder), "--load-format", "dummy", *shlex.split(arguments.serve)]
        options += ["--max-model-len", str(max(arguments.lengths) + 2 * OUTPUT_TOKENS + 64)]
        with served_system(options) as (url, ready_s):
            report.add("diptych serve to ready", ready_s, "s")
            asyncio.run(
                measure(report, url, shape.vocab_size, arguments.lengths, arguments.requests)
            )
    if arguments.save or arguments.out:
        print(report.save(arguments.out) if arguments.out else report.save())


def gpu() -> dict[str, str]:
    """The first one's name."""
    import torch

    return {"name": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}


if __name__ == "__main__":
    main()
