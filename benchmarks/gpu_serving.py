"""Split prefill and decode against two workers that do both, under the same load.

    python -m benchmarks.gpu_serving [--save] [--systems split aggregated combined]
        [--loads 4096/512@3,6,9 2048/512@8,16] [--seconds 20] [--trace FILE --faster 2]
        [--systems vllm --vllm PYTHONPATH]

Each system is `diptych serve` on the same two GPUs with random weights, one after the other:

    split       one prefill worker, one decode worker; every prompt is handed over
    aggregated  two workers that serve whole requests, behind the same router
    combined    as split, but prompts of up to --local-tokens stay on the decode worker where that
                is cheaper
    small-steps as aggregated, with steps of at most 1024 tokens for the sake of the time between
                tokens
    vllm        two vLLM servers, requests in turn

Load is open-loop (see `diptych.bench`), seeds are the same for all, and every size and rate gets
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
from dataclasses import replace
from pathlib import Path

import httpx

from benchmarks.dummy_tokenizer import write_tokenizer
from benchmarks.gpu_handover import gpu
from benchmarks.gpu_shapes import SHAPES
from benchmarks.report import Report
from benchmarks.serving import served_system
from benchmarks.vllm_replicas import vllm_replicas
from diptych.bench.arrivals import Arrival, Lengths, Sizes, open_loop, replayed
from diptych.bench.jobs import Target
from diptych.bench.load import run, shared
from diptych.bench.prompts import Prompts
from diptych.bench.summary import Figures, summary
from diptych.planning.trace import faster, read_trace
from router.api.slo import SloTargets

SYSTEMS = {
    "split": ("--prefill", "1", "--decode", "1"),
    "aggregated": ("--prefill", "0", "--decode", "2"),
    "combined": ("--prefill", "1", "--decode", "1"),
    "small-steps": ("--prefill", "0", "--decode", "2", "--max-step-tokens", "1024"),
}
VLLM = "vllm"
LOCAL_PREFILL = "DIPTYCH_ROUTER_LOCAL_PREFILL_MAX_TOKENS"


CLIENTS = 4
Load = tuple[str, list[Arrival], Prompts]


def workloads(arguments: argparse.Namespace, vocab: int) -> Iterator[Load]:
    """Every load, with its name and how its prompts are made."""
    ids = range(vocab)
    for load in arguments.loads:
        size, _, rates = load.partition("@")
        prompt, output = map(int, size.split("/"))
        for rate in map(float, rates.split(",")):
            seed = int(prompt * 1000 + rate * 10)
            sizes = Sizes(prompt=Lengths(prompt, prompt), output=Lengths(output, output), seed=seed)
            arrivals = open_loop(sizes, rate=rate, seconds=arguments.seconds)
            yield f"{size} at {rate:g}/s", arrivals, Prompts(seed=seed, ids=list(ids))
    if arguments.trace:
        arrivals, left_out = replayed(
            faster(read_trace(arguments.trace), arguments.faster),
            longest=arguments.longest,
            requests=arguments.trace_requests,
        )
        name = f"{arguments.trace.stem} x {arguments.faster:g} without {left_out} longer"
        yield name, arrivals, Prompts(seed=0, ids=list(ids))


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
    report: Report, system: str, urls: Sequence[str], model: str, loads: Sequence[Load]
) -> None:
    """All loads on one system."""
    fields = {
        "ignore_eos": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    targets = [Target(url=url, model=model, fields=fields, timeout_s=300) for url in urls]
    _, first, prompts = loads[0]
    other = replace(prompts, seed=prompts.seed + 1)
    asyncio.run(run(shared(targets, other, first[:8], clients=len(urls))))
    for name, arrivals, prompts in loads:
        loaded = asyncio.run(run(shared(targets, prompts, arrivals, clients=CLIENTS)))
        print(f"== {system}, {name}", flush=True)
        for figure, value in reported(summary(loaded.outcomes, SloTargets())).items():
            report.add(f"{name}: {system}, {figure}", value, unit(figure))


def reported(figures: Figures) -> dict[str, float]:
    """What the report keeps of a run."""
    found: dict[str, float] = {"requests": figures.requests, "failed": figures.failed}
    if figures.failed < figures.requests:
        found["output_tokens_per_s"] = figures.output_tokens_per_s
        found |= {"good_share": figures.good_share, "goodput": figures.goodput}
    for name, spread in (("ttft", figures.ttft), ("tpot", figures.tpot), ("itl", figures.itl)):
        if spread is not None:
            found |= {f"{name}_p50_ms": 1e3 * spread.p50, f"{name}_p99_ms": 1e3 * spread.p99}
    return found


def served_name(url: str) -> str:
    """The model that an endpoint serves."""
    return str(httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"])


def unit(figure: str) -> str:
    """Of a figure that the report keeps, by its name."""
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
    parser.add_argument(
        "--loads",
        nargs="*",
        default=["4096/512@3,6,9", "2048/512@8,16"],
        metavar="PROMPT/OUTPUT@RATE,...",
        help="tokens of each request, and requests per second of one load after the other",
    )
    parser.add_argument("--seconds", type=float, default=20, help="of arrivals, per load")
    parser.add_argument("--trace", type=Path, help="also replay this")
    parser.add_argument("--trace-requests", type=int, default=300)
    parser.add_argument("--faster", type=float, default=1.0, help="than the trace was")
    parser.add_argument(
        "--longest", type=int, default=16_384, help="prompt and output taken of the trace"
    )
    parser.add_argument("--local-tokens", type=int, default=512, help="prompts kept in combined")
    parser.add_argument("--vllm", default="", metavar="PYTHONPATH", help="where vLLM is")
    parser.add_argument("--serve", default="", help="more options of `diptych serve`, one string")
    parser.add_argument("--save", action="store_true", help="keep a JSON file in results/")
    parser.add_argument("--out", type=Path, help="keep it in this folder")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.model]
    kept = ("model", "loads", "seconds", "trace_requests", "faster", "local_tokens", "serve")
    settings = {key: getattr(arguments, key) for key in kept}
    settings["trace"] = arguments.trace.name if arguments.trace else None
    loads = list(workloads(arguments, shape.vocab_size))
    longest = max(each.prompt_tokens + each.output_tokens for _, load, _ in loads for each in load)
    with tempfile.TemporaryDirectory() as name:
        folder = shape.write(Path(name) / arguments.model)
        write_tokenizer(folder, shape.vocab_size)
        for system in arguments.systems:
            report = Report(f"gpu-serving-{system}", settings, gpu=gpu())
            with served(system, arguments, folder, longest) as urls:
                measure(report, system, urls, served_name(urls[0]), loads)
            if arguments.save or arguments.out:
                print(report.save(arguments.out) if arguments.out else report.save())


if __name__ == "__main__":
    main()
