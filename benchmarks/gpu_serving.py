"""Split prefill and decode against two workers that do both, under the same load.

    python -m benchmarks.gpu_serving [--save] [--systems split aggregated combined]
        [--sizes 4096/512 2048/512] [--rates 2 4 6 8] [--seconds 40] [--trace FILE --faster 2]
        [--systems vllm --vllm PYTHONPATH]

Each system is `diptych serve` on the same two GPUs with random weights, one after the other:

    split       one prefill worker, one decode worker; every prompt is handed over
    aggregated  two workers that serve whole requests, behind the same router
    combined    as split, but prompts of up to --local-tokens stay on the decode worker where that
                is cheaper
    small-steps as aggregated, with steps of at most 1024 tokens for the sake of the time between
                tokens
    vllm        two vLLM servers, requests in turn

Load is open-loop (see `benchmarks.load`), seeds are the same for all, and every size and rate gets
arrivals of its own, so no cache helps. Goodput counts requests that meet the service level:
first token within 1 s, 15 ms per token on average, and 25 ms between tokens at the 99th percentile.
"""

import argparse
import asyncio
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.dummy_tokenizer import write_tokenizer
from benchmarks.gpu_handover import gpu
from benchmarks.gpu_shapes import SHAPES
from benchmarks.load import Arrival, Slo, poisson, run, summary, trace
from benchmarks.report import Report
from benchmarks.serving import served_system
from benchmarks.vllm_replicas import vllm_replicas

SYSTEMS = {
    "split": ("--prefill", "1", "--decode", "1"),
    "aggregated": ("--prefill", "0", "--decode", "2"),
    "combined": ("--prefill", "1", "--decode", "1"),
    "small-steps": ("--prefill", "0", "--decode", "2", "--max-step-tokens", "1024"),
}
VLLM = "vllm"
LOCAL_PREFILL = "DIPTYCH_ROUTER_LOCAL_PREFILL_MAX_TOKENS"


def workloads(arguments: argparse.Namespace, vocab: int) -> Iterator[tuple[str, list[Arrival]]]:
    """Every load, with its name."""
    for size in arguments.sizes:
        prompt, output = map(int, size.split("/"))
        for rate in arguments.rates:
            seed = int(prompt * 1000 + rate * 10)
            yield (
                f"{size} at {rate:g}/s",
                poisson(
                    rate=rate,
                    seconds=arguments.seconds,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    vocab=vocab,
                    seed=seed,
                ),
            )
    if arguments.trace:
        arrivals, left_out = trace(
            arguments.trace,
            requests=arguments.trace_requests,
            longest=arguments.longest,
            faster=arguments.faster,
            vocab=vocab,
        )
        yield f"{arguments.trace.stem} x {arguments.faster:g} without {left_out} longer", arrivals


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable for the processes started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def served(
    system: str, arguments: argparse.Namespace, folder: Path, longest: int
) -> Iterator[Sequence[str]]:
    """One of the systems until the block ends: its URLs."""
    if system == VLLM:
        log = (arguments.out or folder.parent) / "vllm.log"
        with vllm_replicas(folder, arguments.vllm, longest=longest, log=log) as urls:
            yield urls
        return
    options = ["--model", str(folder), "--load-format", "dummy", *SYSTEMS[system]]
    options += ["--max-model-len", str(longest + 1), *shlex.split(arguments.serve)]
    local = arguments.local_tokens if system == "combined" else 0
    with environment(LOCAL_PREFILL, str(local)), served_system(options) as (url, _):
        yield [url]


def measure(
    report: Report, system: str, urls: Sequence[str], loads: Sequence[tuple[str, list[Arrival]]]
) -> None:
    """All loads on one system."""
    asyncio.run(run(urls, loads[0][1][:8], clients=len(urls)))
    for name, arrivals in loads:
        found = summary(asyncio.run(run(urls, arrivals)), Slo())
        print(f"== {system}, {name}", flush=True)
        for figure, value in found.items():
            report.add(f"{name}: {system}, {figure}", float(value), unit(figure))


def unit(figure: str) -> str:
    """Of a figure of `benchmarks.load.summary`, by its name."""
    if figure.endswith("_ms"):
        return "ms"
    return {"output_tokens_per_s": "tok/s", "good_share": "x", "goodput": "req/s"}.get(figure, "")


def main() -> None:
    """Serve each system, load it, perhaps save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, VLLM], default=list(SYSTEMS))
    parser.add_argument("--sizes", nargs="*", default=["4096/512", "2048/512"])
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--seconds", type=float, default=40, help="of arrivals, per load")
    parser.add_argument("--trace", type=Path, help="also replay this")
    parser.add_argument("--trace-requests", type=int, default=300)
    parser.add_argument("--faster", type=float, default=1.0, help="than the trace was")
    parser.add_argument("--longest", type=int, default=16_384, help="prompt taken of the trace")
    parser.add_argument("--local-tokens", type=int, default=512, help="prompts kept in combined")
    parser.add_argument("--vllm", default="", metavar="PYTHONPATH", help="where vLLM is")
    parser.add_argument("--serve", default="", help="more options of `diptych serve`, one string")
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    parser.add_argument("--out", type=Path, help="keep it in this folder")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    kept = ("model", "sizes", "rates", "seconds", "faster", "local_tokens", "serve")
    settings = {key: getattr(arguments, key) for key in kept}
    loads = list(workloads(arguments, shape.vocab_size))
    longest = max(len(each.prompt) + each.output_tokens for _, load in loads for each in load)
    with tempfile.TemporaryDirectory() as name:
        folder = shape.write(Path(name) / arguments.model)
        write_tokenizer(folder, shape.vocab_size)
        for system in arguments.systems:
            report = Report(f"gpu-serving-{system}", settings, gpu=gpu())
            with served(system, arguments, folder, longest) as urls:
                measure(report, system, urls, loads)
            if arguments.save or arguments.out:
                print(report.save(arguments.out) if arguments.out else report.save())


if __name__ == "__main__":
    main()
