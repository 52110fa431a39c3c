"""The whole system on one machine beside Hugging Face transformers and the limit of its memory.

    python -m benchmarks.local_system [--rounds 5]

Starts `diptych serve` (router, one prefill, one decode worker, default settings) on the demo model,
transformers in two processes of its own (with its default environment and with our engine's thread
and memory settings; ratios are against the faster of the two), and our engine without a network in
another. Rounds alternate, since nothing else makes ratios comparable on a machine that does other
things too; a figure is the median of its rounds. Prompts are random ids, so no cache helps.

Decode: seconds per token between the first and the last token of streams over HTTP, against a
decode step of `generate` (time for 49 tokens - time for 1, over 48). Prefill: prompt tokens over
time to first token through HTTP, against one forward pass. Overhead: time to first token through
HTTP minus the same through `engine.llm`, prompts of 32 tokens.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from benchmarks.local_peer import DECODE_TOKENS, PROMPT_TOKENS
from benchmarks.report import Report, median
from benchmarks.serving import served_system, stream
from core.modelfile.resolve import resolve_model
from engine.threads import available_cores, compute_thread_env

BATCHES = (1, 8)
PREFILL_TOKENS = 512
OVERHEAD_TOKENS = 32
OVERHEAD_ROUNDS = 40
WHO = ("hf", "hf tuned", "llm", "system")
VOCAB = range(100, 49_000)


class PeerProcess:
    """A `benchmarks.local_peer` child."""

    def __init__(self, kind: str, folder: Path, env: dict[str, str]) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.local_peer", kind, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **env},
        )
        self._read()

    def ask(self, what: str, value: object) -> float:
        """One request, one number."""
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({what: value}) + "\n")
        self._child.stdin.flush()
        return float(self._read()[what])

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"peer ended with {self._child.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the child."""
        self._child.kill()
        self._child.wait()


def random_prompt(length: int) -> list[int]:
    """Fresh random ids."""
    return random.choices(VOCAB, k=length)


async def decode_step_s(client: httpx.AsyncClient, batch: int) -> float:
    """Seconds per token of each of `batch` streams, all under way."""
    runs = await asyncio.gather(
        *(stream(client, random_prompt(PROMPT_TOKENS), 2 + DECODE_TOKENS) for _ in range(batch))
    )
    began = max(run.times[2] for run in runs)
    ended = max(run.times[-1] for run in runs)
    return (ended - began) / DECODE_TOKENS


async def first_token_s(client: httpx.AsyncClient, length: int) -> float:
    """Time to first token."""
    times = (await stream(client, random_prompt(length), 1)).times
    return times[1] - times[0]


async def measure(report: Report, folder: Path, rounds: int) -> None:
    """Everything, into the report."""
    threads = compute_thread_env(available_cores())
    peers = {
        "hf": PeerProcess("transformers", folder, {}),
        "hf tuned": PeerProcess("transformers", folder, threads),
        "llm": PeerProcess("llm", folder, threads),
    }
    llm = peers["llm"]
    samples: dict[str, list[float]] = {}

    def keep(name: str, value: float) -> None:
        samples.setdefault(name, []).append(value)

    try:
        with served_system() as (url, ready_s):
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                await decode_step_s(client, 2)
                for _ in range(rounds):
                    for batch in BATCHES:
                        for who, peer in peers.items():
                            keep(f"{who} decode {batch}", peer.ask("decode", batch))
                        keep(f"system decode {batch}", await decode_step_s(client, batch))
                    for who, peer in peers.items():
                        keep(f"{who} prefill", peer.ask("prefill", PREFILL_TOKENS))
                    keep("system prefill", await first_token_s(client, PREFILL_TOKENS))
                    keep("bandwidth", llm.ask("bandwidth", True))
                for _ in range(OVERHEAD_ROUNDS):
                    alone = llm.ask("prefill", OVERHEAD_TOKENS)
                    keep("llm first token", alone)
                    through = await first_token_s(client, OVERHEAD_TOKENS)
                    keep("system first token", through)
                    keep("overhead", through - alone)
    finally:
        for peer in peers.values():
            peer.close()
    summarise(report, folder, samples, ready_s)


def summarise(
    report: Report, folder: Path, samples: dict[str, list[float]], ready_s: float
) -> None:
    """Figures out of samples."""
    middle = {name: median(values) for name, values in samples.items()}
    goals = {1: ">= 1.3", 8: ">= 2"}
    for batch in BATCHES:
        for who in WHO:
            name = f"{who} decode {batch}"
            rate = batch / middle[name]
            report.add(f"{who}: decode, batch {batch}", rate, "tok/s", samples=samples[name])
        best = min(middle[f"hf decode {batch}"], middle[f"hf tuned decode {batch}"])
        ratio = best / middle[f"system decode {batch}"]
        report.add(f"system / transformers: decode, batch {batch}", ratio, "x", goal=goals[batch])
    for who in WHO:
        rate = PREFILL_TOKENS / middle[f"{who} prefill"]
        report.add(
            f"{who}: prefill of {PREFILL_TOKENS}", rate, "tok/s", samples=samples[f"{who} prefill"]
        )
    ratio = min(middle["hf prefill"], middle["hf tuned prefill"]) / middle["system prefill"]
    report.add("system / transformers: prefill", ratio, "x", goal=">= 0.9")
    weight_bytes = (folder / "model.safetensors").stat().st_size
    report.add("memory bandwidth", middle["bandwidth"] / 1e9, "GB/s", samples=samples["bandwidth"])
    limit = middle["bandwidth"] / weight_bytes
    report.add("limit of decode at batch 1: bandwidth / weight bytes", limit, "tok/s")
    report.add("system / limit: decode, batch 1", 1 / middle["system decode 1"] / limit, "x")
    report.add(
        "time to first token over engine.llm, p50",
        middle["overhead"] * 1e3,
        "ms",
        samples=samples["overhead"],
        goal="<= 15",
    )
    report.add("diptych serve to ready, warm caches", ready_s, "s", goal="<= 15")


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each measurement")
    parser.add_argument("--save", action="store_true", help="write a file into benchmarks/results")
    arguments = parser.parse_args()
    folder = resolve_model("demo", print)
    report = Report(
        "local-system", {"model": "demo", "rounds": arguments.rounds, "dtype": "float32"}
    )
    asyncio.run(measure(report, folder, arguments.rounds))
    if arguments.save:
        print(f"saved {report.save()}")


if __name__ == "__main__":
    main()
