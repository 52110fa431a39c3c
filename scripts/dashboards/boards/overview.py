"""Do clients get what they were promised, and if not, what kind of failure is it."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import against_target, quantiles
from scripts.dashboards.panels import Query, Steps, distribution, graph, number
from scripts.dashboards.promql import Source, Vector
from scripts.dashboards.recording import SERVER_ERRORS

TARGETS = {"all": "every target", "ttft": "first token", "tpot": "per token", "itl": "gaps"}


def board(source: Source) -> Board:
    """The dashboard to start from."""
    return Board(
        name="overview",
        title="Overview",
        description="What clients get: goodput, latency against its targets, errors.",
        of_workers=False,
        rows=[_now(source), _latency(source), _traffic(source), _failures(source)],
    )


def ready_workers(source: Source, role: str) -> Vector:
    """Workers of a role that routers may send work to."""
    workers = source.now("diptych_router_workers", role=role, state="ready")
    return workers.max("namespace", "release").sum()


def _now(source: Source) -> Row:
    return Row(
        "Now",
        [
            number(
                "Goodput",
                "Sequences per second that met every target. If it falls while traffic does not, "
                "the latency row below says which target is missed.",
                Query(source.now("diptych:goodput:rate5m").sum()),
                unit="reqps",
            ),
            number(
                "Within SLO",
                "Share of sequences that met every target, over 5 minutes. Below 99% look at which "
                "one is missed, then at Where time goes.",
                Query(_within(source, "all")),
                unit="percentunit",
                steps=Steps(warn=0.99, bad=0.95),
                runbooks=("DiptychSloBurnsFast", "DiptychSloBurnsSlowly"),
                empty_when=_NO_TRAFFIC,
            ),
            number(
                "Errors",
                "Share of requests that failed for a cause that is not their client's. The row "
                "Failures names the causes.",
                Query(source.now("diptych:request_errors:ratio_rate5m").max()),
                unit="percentunit",
                steps=Steps(warn=0.01, bad=0.05),
                runbooks=("DiptychErrorRatioHigh",),
                empty_when=_NO_TRAFFIC,
            ),
            number(
                "Requests",
                "Requests answered per second, whatever the outcome. If it falls to 0 look at the "
                "Ingress, then at the alert DiptychAbsent.",
                Query(source.rate("diptych_router_requests_total").sum()),
                unit="reqps",
                runbooks=("DiptychAbsent",),
            ),
            *(
                number(
                    f"{role.capitalize()} workers ready",
                    "As routers see them. At 0 the other pool serves alone, slower: look at Engine "
                    "and GPU, and at the events of the pods.",
                    Query(ready_workers(source, role)),
                    steps=Steps(warn=1, bad=0.5),
                    runbooks=("DiptychPoolEmpty", "DiptychNoWorkerReady"),
                )
                for role in ("prefill", "decode")
            ),
        ],
    )


def _latency(source: Source) -> Row:
    return Row(
        "Latency against its targets",
        [
            against_target(
                source,
                "ttft",
                "From reading a request to passing its first token on. Above the target: Where "
                "time goes shows whether it waits (add prefill workers) or computes (shorter "
                "prompts, better cache use).",
                runbooks=("DiptychTimeToFirstTokenHigh",),
            ),
            against_target(
                source,
                "tpot",
                "Mean time per token of each sequence. Above the target: decode batches are too "
                "large for it; add decode workers or lower --max-num-seqs.",
                runbooks=("DiptychTimePerOutputTokenHigh",),
            ),
            against_target(
                source,
                "itl",
                "Pauses within a stream. High while the mean is fine: something stalls steps, "
                "mostly prompts computed on decode workers; see Decode, steps by kind.",
                runbooks=("DiptychInterTokenLatencyHigh",),
            ),
            graph(
                "Within each target",
                "Share of sequences that met each target. The lowest line is where to begin.",
                *(Query(_within(source, target), name) for target, name in TARGETS.items()),
                unit="percentunit",
                empty_when=_NO_TRAFFIC,
            ),
            distribution(
                "Time to first token, all of it",
                "Two separate bands mean two kinds of requests: cached and not, or handed over and "
                "local. Compare with Cache and with Router decisions.",
                Query(source.buckets("diptych_router_time_to_first_token_seconds")),
            ),
            graph(
                "Whole requests",
                "From reading a request to the end of its answer; grows with what clients ask for, "
                "so judge it together with the sizes below.",
                *quantiles(source, "diptych_router_request_duration_seconds"),
                unit="s",
            ),
        ],
    )


def _traffic(source: Source) -> Row:
    return Row(
        "Traffic",
        [
            graph(
                "Requests by endpoint",
                "Answered per second. A jump here explains most others: compare before you dig.",
                Query(source.rate("diptych_router_requests_total").sum("api"), "{{api}}"),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "In flight and waiting",
                "Running, in the router's queue, and such as no worker can take at the moment. A "
                "queue that stays means too little capacity; waiting above 0, that no worker fits.",
                Query(source.now("diptych_router_generations_in_flight").sum(), "in flight"),
                Query(source.now("diptych_router_generations_queued").sum(), "queued"),
                Query(source.now("diptych_router_generations_waiting").sum(), "no worker fits"),
                runbooks=("DiptychRequestsWaitForWorkers",),
            ),
            graph(
                "Tokens",
                "Per second. Prompt tokens load the prefill pool, generated ones the decode pool.",
                Query(source.rate("diptych_router_prompt_tokens_total").sum(), "prompt"),
                Query(source.rate("diptych_router_generation_tokens_total").sum(), "generated"),
                unit="cps",
            ),
            graph(
                "Prompt sizes",
                "Tokens per prompt. A change of mix moves the time to first token with nothing "
                "being broken.",
                *quantiles(source, "diptych_router_sequence_prompt_tokens", shares=(0.5, 0.95)),
            ),
            graph(
                "Output sizes",
                "Tokens per sequence. Longer ones hold KV blocks longer: see KV in use on Decode.",
                *quantiles(source, "diptych_router_sequence_generation_tokens", shares=(0.5, 0.95)),
            ),
            graph(
                "Sequences by how they ended",
                "stop and length are good ends; cancelled ones were left by their clients.",
                Query(
                    source.rate("diptych_router_generations_total").sum("outcome"), "{{outcome}}"
                ),
                unit="reqps",
                stacked=True,
            ),
        ],
    )


def _failures(source: Source) -> Row:
    requests = "diptych_router_requests_total"
    return Row(
        "Failures",
        [
            graph(
                "Errors that are ours",
                "Failed requests per second by cause. unavailable: no worker fits; overloaded: the "
                "queue is full; worker_lost and kv_transfer_failed: retries did not help.",
                Query(
                    source.rate(requests, outcome=f"=~{SERVER_ERRORS}").sum("outcome"),
                    "{{outcome}}",
                ),
                unit="reqps",
                stacked=True,
                runbooks=("DiptychErrorRatioHigh",),
            ),
            graph(
                "Errors that are clients'",
                "Refused requests per second by cause. A jump after a release of a client is its "
                "bug; context_length_exceeded, prompts that grew.",
                Query(
                    source.rate(
                        requests, outcome=f"!~{SERVER_ERRORS}|ok|disconnected|shutdown"
                    ).sum("outcome"),
                    "{{outcome}}",
                ),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Callers that were turned away",
                "Per second: keys that are missing, wrong or past their limits. A jump is "
                "a key that was rotated on one side only, or somebody who guesses.",
                Query(source.rate("diptych_router_refusals_total").sum("code"), "{{code}}"),
                unit="reqps",
                stacked=True,
                empty_when="nobody was turned away.",
            ),
            graph(
                "Attempts that were repeated",
                "Per second by cause; clients see these as latency only. worker_lost: pods die; "
                "kv_transfer_failed: see KV transfer.",
                Query(source.rate("diptych_router_retries_total").sum("reason"), "{{reason}}"),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Clients that left",
                "Per second by how far the answer was. Many while waiting: their timeouts are "
                "shorter than the time to first token.",
                Query(
                    source.rate("diptych_router_client_disconnects_total").sum("phase"), "{{phase}}"
                ),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Refused with 429",
                "Per second. refused: on arrival; pushed_out: by a request with more right to the "
                "queue. Add workers, or lower what one caller may send.",
                Query(source.rate("diptych_router_shed_total").sum("reason"), "{{reason}}"),
                unit="reqps",
                stacked=True,
                runbooks=("DiptychRequestsShed",),
            ),
        ],
    )


def _within(source: Source, target: str) -> Vector:
    name = "diptych_router_slo_sequences_total"
    met = source.over("5m").rate(name, target=target, outcome="met").sum()
    return met / (source.over("5m").rate(name, target=target).sum() > 0)


_NO_TRAFFIC = "no request ended in the last five minutes."
