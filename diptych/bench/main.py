"""`diptych bench`: load an endpoint, report what operators compare."""

import asyncio
import json
import secrets
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TextIO

from rich.console import Console

from core.errors import ConfigError, DiptychError
from core.settings import load_or_exit
from diptych.bench.arrivals import Arrival, Sizes, open_loop, replayed
from diptych.bench.endpoint import Endpoint, look_at
from diptych.bench.jobs import Job
from diptych.bench.load import run, shared
from diptych.bench.report import Run, as_json, show
from diptych.bench.settings import BenchSettings
from diptych.bench.summary import summary
from diptych.bench.timelines import fetch
from diptych.planning.trace import faster, read_trace

_STOPPED = 130
_WARMUP_OUTPUT = 8


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status.

    0; 1: the endpoint can't be loaded, every request failed, or any did with --strict; 2: wrong
    settings; 130: stopped by Ctrl-C.
    """
    settings = load_or_exit(BenchSettings, argv, prog="diptych bench", env_prefix="DIPTYCH_BENCH_")
    try:
        # Opened first: a file that can't be written must not cost a whole run.
        with _place(settings.json_) as place:
            measured = asyncio.run(measure(settings))
            if place is not None:
                place.write(json.dumps(as_json(measured)) + "\n")
    except KeyboardInterrupt:
        print("diptych bench: stopped", file=sys.stderr)
        return _STOPPED
    except DiptychError as error:
        print(f"diptych bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    show(measured, Console(stderr=settings.json_ == "-", soft_wrap=True, highlight=False))
    figures = measured.figures
    return int(figures.failed == figures.requests or (settings.strict and figures.failed > 0))


async def measure(settings: BenchSettings) -> Run:
    """Look at the endpoint, load it, and sum up.

    Raises:
        ConfigError: the settings ask for what can't be.
        DiptychError: the endpoint can't be reached, or refuses.
    """
    # A file that can't be read is told before anything is asked.
    traced = None
    if settings.trace is not None:
        traced = faster(read_trace(Path(settings.trace)), settings.faster)
    settings = settings.model_copy(
        update={"seed": secrets.randbelow(2**31) if settings.seed is None else settings.seed}
    )
    assert settings.seed is not None
    endpoint = await look_at(settings, settings.seed)
    left_out = 0
    if traced is not None:
        arrivals, left_out = replayed(
            traced,
            longest=endpoint.max_model_len,
            requests=settings.requests,
            seconds=settings.duration,
        )
        jobs = shared(
            [endpoint.target],
            endpoint.prompts,
            arrivals,
            clients=settings.clients,
            warmup=_warmup(settings, arrivals),
        )
    else:
        jobs = _made_up(settings, endpoint, settings.seed)
    loaded = await run(jobs)
    if not loaded.outcomes:
        raise ConfigError("No request was sent: --duration is too short.")
    timelines = None
    if settings.timelines:
        timelines = await fetch(endpoint.target, loaded.outcomes, settings.timelines)
    return Run(
        settings=settings,
        endpoint=endpoint,
        loaded=loaded,
        figures=summary(loaded.outcomes, settings.slo),
        left_out=left_out,
        timelines=timelines,
    )


def _made_up(settings: BenchSettings, endpoint: Endpoint, seed: int) -> list[Job]:
    longest = settings.prompt.high + settings.output.high
    if endpoint.max_model_len is not None and longest > endpoint.max_model_len:
        raise ConfigError(
            f"The model takes {endpoint.max_model_len} tokens, and prompt and output can be "
            f"{longest}: lower --prompt-tokens or --output-tokens."
        )
    sizes = Sizes(prompt=settings.prompt, output=settings.output, seed=seed)
    endless = settings.in_flight > 0 and settings.count is None
    arrivals: list[Arrival] = []
    if settings.rate is not None:
        arrivals = open_loop(
            sizes, rate=settings.rate, requests=settings.count, seconds=settings.duration
        )
    elif settings.count is not None:
        arrivals = [sizes.arrival(number) for number in range(settings.count)]
    return shared(
        [endpoint.target],
        endpoint.prompts,
        arrivals,
        clients=settings.clients,
        concurrency=settings.in_flight,
        until_s=settings.duration if settings.in_flight else None,
        sizes=sizes if endless else None,
        warmup=_warmup(settings, arrivals or [sizes.arrival(0)]),
    )


def _warmup(settings: BenchSettings, arrivals: Sequence[Arrival]) -> list[Arrival]:
    """As long as the first requests, but with prompts of their own and short outputs."""
    return [
        Arrival(
            number=-1_000 - index,
            prompt_tokens=arrivals[index % len(arrivals)].prompt_tokens,
            output_tokens=_WARMUP_OUTPUT,
        )
        for index in range(settings.warmup)
    ]


def _place(name: str | None) -> AbstractContextManager[TextIO | None]:
    if name is None or name == "-":
        return nullcontext(sys.stdout if name else None)
    try:
        return Path(name).open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {name} can't be written: {error.strerror}.") from None
