"""A run, for people as tables and for programs as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from diptych.bench.endpoint import Endpoint
from diptych.bench.load import Loaded
from diptych.bench.settings import BenchSettings
from diptych.bench.summary import Figures, Spread
from diptych.bench.timelines import Timelines

_LATE_S = 0.01
"""Beyond which the client's own lateness is worth a warning, at the 99th percentile."""
_STALL_S = 0.1
_CACHED = 0.1
"""Share of the prompts that may be cached beyond what was meant to be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that is known of one run."""

    settings: BenchSettings
    endpoint: Endpoint
    loaded: Loaded
    figures: Figures
    left_out: int
    """Requests of a trace that were too long for the model."""
    timelines: Timelines | None


def as_json(run: Run) -> dict[str, Any]:
    """Settings, figures and raw samples, free of the key; durations in seconds."""
    settings = run.settings.model_dump(mode="json", by_alias=False)
    # Infinity is no number in JSON.
    settings["rate"] = None if run.settings.rate is None else f"{run.settings.rate:g}"
    endpoint = run.endpoint
    return {
        "settings": settings,
        "endpoint": {
            "url": endpoint.target.url,
            "model": endpoint.target.model,
            "software": endpoint.software,
            "version": endpoint.version,
            "prompts": "token ids" if endpoint.prompts.ids else "text",
            "notes": endpoint.notes,
        },
        "figures": asdict(run.figures),
        "client": {"stall_s": run.loaded.stall_s},
        "left_out": run.left_out,
        "stages_s": run.timelines.stages if run.timelines and run.timelines.raw else None,
        "timelines": run.timelines.raw if run.timelines else None,
        "requests": [asdict(each) for each in run.loaded.outcomes],
    }


def show(run: Run, console: Console) -> None:
    """Print what operators compare, then what makes it less comparable."""
    figures, endpoint = run.figures, run.endpoint
    made = " ".join(filter(None, (endpoint.software, endpoint.version)))
    console.print(
        f"{endpoint.target.model} at {endpoint.target.url}" + (f", {made}" if made else "")
    )
    console.print(f"{_load(run)}\n")
    console.print(_throughput(figures))
    console.print(_latencies(figures))
    slo = run.settings.slo
    console.print(
        f"goodput  {figures.goodput:.3g} requests/s, {figures.good_share:.1%} of the requests met "
        f"the SLO: TTFT within {slo.ttft_s:g} s ({figures.met['ttft']:.1%}), TPOT "
        f"{slo.tpot_s * 1e3:g} ms ({figures.met['tpot']:.1%}), 99 of 100 gaps {slo.itl_s * 1e3:g} "
        f"ms ({figures.met['itl']:.1%})"
    )
    if figures.causes:
        console.print(_failures(run))
    if run.timelines is not None and run.timelines.raw:
        console.print(_stages(run.timelines))
    for line in _warnings(run):
        console.print(f"[yellow]![/] {line}")


def _load(run: Run) -> str:
    settings = run.settings
    if settings.trace is not None:
        load = f"{settings.trace}, {settings.faster:g} times as fast"
    elif settings.in_flight:
        load = f"closed loop, {settings.in_flight} under way"
    else:
        load = f"open loop, {settings.rate:g} requests/s"
    sizes = f"{settings.prompt_tokens} prompt and {settings.output_tokens} output tokens"
    if settings.shared_prefix_tokens:
        sizes += f", the first {settings.shared_prefix_tokens} shared"
    way = "chat" if settings.chat else "completions"
    made = "" if settings.trace is not None else f"; {sizes}"
    return f"{way}; {load}{made}; seed {settings.seed}"


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _throughput(figures: Figures) -> Table:
    table = _table("throughput", "total", "per second")
    done = figures.requests - figures.failed
    table.add_row("requests", f"{done:,}", f"{figures.requests_per_s:,.3g}")
    for name, total, rate in (
        ("prompt tokens", figures.prompt_tokens, figures.prompt_tokens_per_s),
        ("output tokens", figures.output_tokens, figures.output_tokens_per_s),
    ):
        table.add_row(name, f"{total:,}", f"{rate:,.1f}")
    if figures.cached_tokens is not None and figures.prompt_tokens:
        share = figures.cached_tokens / figures.prompt_tokens
        table.add_row("of prompts, cached", f"{figures.cached_tokens:,}", f"{share:.1%}")
    table.add_row("seconds", f"{figures.duration_s:,.2f}", "")
    return table


def _latencies(figures: Figures) -> Table:
    table = _table("ms", "mean", "p50", "p90", "p99")
    for name, spread in (
        ("TTFT", figures.ttft),
        ("TPOT", figures.tpot),
        ("ITL", figures.itl),
        ("end to end", figures.end_to_end),
    ):
        table.add_row(name, *_cells(spread))
    return table


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 4
    return [f"{1e3 * value:,.2f}" for value in (spread.mean, spread.p50, spread.p90, spread.p99)]


def _failures(run: Run) -> Table:
    table = _table("failed because", "requests", "for example")
    table.columns[2].justify = "left"
    for cause, count in run.figures.causes.items():
        example = next(each.detail for each in run.loaded.outcomes if each.cause == cause)
        table.add_row(f"[red]{cause}[/]", f"{count:,}", example)
    return table


def _stages(timelines: Timelines) -> Table:
    stages = timelines.stages
    total = sum(stages.values())
    table = _table(f"where time went ({len(timelines.raw)} timelines)", "mean ms", "share")
    for name, seconds in stages.items():
        table.add_row(name, f"{1e3 * seconds:,.2f}", f"{seconds / total:.1%}")
    table.add_row("total", f"{1e3 * total:,.2f}", "")
    return table


def _warnings(run: Run) -> Iterator[str]:
    yield from run.endpoint.notes
    if run.left_out:
        yield f"{run.left_out} requests of the trace are too long for the model and were left out."
    figures, meant = run.figures, run.settings.shared_prefix_tokens * run.figures.requests
    if run.settings.trace is None and figures.cached_tokens is not None and figures.prompt_tokens:
        share = (figures.cached_tokens - meant) / figures.prompt_tokens
        if share > _CACHED:
            yield (
                f"{share:.0%} of the prompts' tokens were cached though nothing was meant to be: a "
                "chat template, or an earlier run with the same --seed."
            )
    late, stall_s = run.figures.late, run.loaded.stall_s
    if (late is not None and late.p99 > _LATE_S) or stall_s > _STALL_S:
        yield (
            f"The client itself was late: it sent {1e3 * (late.p99 if late else 0):.1f} ms after "
            f"the time at p99, and stood still for up to {1e3 * stall_s:.1f} ms. Figures include "
            "that: use more --clients, or a machine with nothing else to do."
        )
    if run.timelines is not None and run.timelines.missing:
        yield f"Timelines are missing: {run.timelines.missing} (only a Diptych router has them)."
