"""The prefill pool: how far behind it is, how fast it computes, what it has leased out."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import quantiles
from scripts.dashboards.panels import Query, Steps, graph, number
from scripts.dashboards.promql import Source

_MINE = {"role": "prefill"}


def board(source: Source) -> Board:
    """The dashboard of the prefill pool."""
    return Board(
        name="prefill",
        title="Prefill",
        description="Workers that compute prompts and lease their KV to decode workers.",
        role="prefill",
        rows=[_load(source), _steps(source), _leases(source)],
    )


def _load(source: Source) -> Row:
    return Row(
        "Load",
        [
            graph(
                "Backlog",
                "Seconds of prompts that each worker has before a new one. All high: add workers. "
                "One high: it is slow, or placement prefers its cache; see Router decisions.",
                Query(source.now("diptych:prefill_backlog_seconds", **_MINE), "{{worker}}"),
                unit="s",
                runbooks=("DiptychPrefillBacklogHigh",),
                empty_when="no worker has measured its rate of prefill yet.",
            ),
            graph(
                "Backlog in tokens",
                "Prompt tokens accepted and not yet computed.",
                Query(source.now("diptych_backlog_tokens", **_MINE).sum("worker"), "{{worker}}"),
                stacked=True,
            ),
            graph(
                "Requests",
                "Waiting for admission, and running. Waiting ones with free KV blocks mean that "
                "--max-num-seqs is the limit.",
                Query(source.now("diptych_requests_waiting", **_MINE).sum(), "waiting"),
                Query(source.now("diptych_requests_running", **_MINE).sum(), "running"),
            ),
            graph(
                "Prompt tokens computed",
                "Per second and worker. Below the measured rate: the worker idles.",
                Query(source.added("diptych_step_tokens", phase="prefill", **_MINE).sum("worker"),
                      "{{worker}}"),
                unit="cps",
                stacked=True,
            ),
            graph(
                "Measured rate",
                "Tokens per second that each worker says it can compute; placement reckons with "
                "it. One much lower than the others runs on a throttled or shared GPU.",
                Query(source.now("diptych_prefill_tokens_per_second", **_MINE), "{{worker}}"),
                unit="cps",
            ),
            number(
                "Least backlog",
                "Seconds until the least busy worker would begin a new prompt, as routers "
                "predict. Above half of the target for the first token: add workers.",
                Query(source.now("diptych_router_backlog_seconds").max()),
                unit="s",
                steps=Steps(warn=0.5, bad=5),
                width=8,
                height=8,
                runbooks=("DiptychPrefillBacklogHigh",),
            ),
        ],
    )  # fmt: skip


def _steps(source: Source) -> Row:
    return Row(
        "Steps",
        [
            graph(
                "Duration of steps",
                "Time of one engine step. Prompts are cut into chunks so that it stays below "
                "what --max-step-tokens allows; lower that if others must wait less.",
                *quantiles(source, "diptych_step_duration_seconds", role="prefill"),
                unit="s",
            ),
            graph(
                "Tokens per step",
                "Prompt tokens of a step that has some. Small with a backlog: chunks are limited "
                "by KV blocks or by --max-step-tokens.",
                Query(source.mean("diptych_step_tokens", phase="prefill", **_MINE), "mean"),
                *quantiles(source, "diptych_step_tokens", phase="prefill", role="prefill"),
            ),
            graph(
                "Prefix cache",
                "Share of prompt tokens that need not be computed. A fall with equal traffic: "
                "blocks are evicted sooner (see Cache) or requests are spread differently.",
                Query(source.now("diptych:prefix_cache_hit:ratio_rate5m", **_MINE),
                      "{{pool}} {{role}}"),
                unit="percentunit",
                empty_when="no prompt was looked up in the last five minutes.",
            ),
            graph(
                "KV blocks",
                "held are in use or leased, cached can be taken. No free and no cached ones left: "
                "leases live too long (see below), or the pool is too small.",
                Query(source.now("diptych_kv_blocks", **_MINE).sum("state"), "{{state}}"),
                stacked=True,
            ),
            graph(
                "Tokens generated here",
                "Per second. Above 0 only where no decode worker could take a request.",
                Query(source.added("diptych_step_tokens", phase="decode", **_MINE).sum("worker"),
                      "{{worker}}"),
                unit="cps",
                runbooks=("DiptychPoolEmpty",),
            ),
        ],
    )  # fmt: skip


def _leases(source: Source) -> Row:
    return Row(
        "Leases",
        [
            graph(
                "Leases",
                "Prompts whose KV is leased out or will be. Growing without more traffic: decode "
                "workers fetch too slowly; see KV transfer.",
                Query(source.now("diptych_kv_leases").sum("worker"), "{{worker}}"),
                stacked=True,
            ),
            graph(
                "Blocks under a lease",
                "They can't be reused until decode has read them or the lease ends.",
                Query(source.now("diptych_kv_leased_blocks").sum("worker"), "{{worker}}"),
                stacked=True,
            ),
            graph(
                "Prompts completed for decode",
                "Per second.",
                Query(source.rate("diptych_kv_commits_total").sum("worker"), "{{worker}}"),
                unit="ops",
                stacked=True,
            ),
            graph(
                "Out of the ordinary",
                "Messages and ends that should be rare, per second. expired_lease and "
                "overdue_lease: decode workers vanished or are cut off; late ones come with "
                "every abort and are harmless.",
                Query(source.rate("diptych_kv_export_oddities_total").sum("kind"), "{{kind}}"),
                unit="ops",
                runbooks=("DiptychLeasesExpired",),
                width=24,
            ),
        ],
    )
