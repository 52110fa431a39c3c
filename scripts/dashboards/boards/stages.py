"""Where the time of requests goes, by the stages of the router's ledger."""

from router.timeline import STAGES, STAGES_TO_FIRST_TOKEN
from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import quantiles
from scripts.dashboards.panels import Query, Steps, graph, number
from scripts.dashboards.promql import Source, Vector

_STAGE = "diptych_router_stage_seconds"


def board(source: Source) -> Board:
    """The dashboard that finds the slow part."""
    return Board(
        name="stages",
        title="Where time goes",
        description="Every second of every request by stage; the stages add up to the whole.",
        of_workers=False,
        rows=[_stacked(source), _each(source), _trust(source)],
    )


def _stacked(source: Source) -> Row:
    first = "=~" + "|".join(STAGES_TO_FIRST_TOKEN)
    return Row(
        "Mean request",
        [
            graph(
                "To the first token",
                "Mean seconds per sequence in each stage before its first token. prefill_queue: "
                "add prefill workers; prefill: long or uncached prompts; route: no worker fits; "
                "queue: the router holds requests back.",
                Query(_per_sequence(source, stage=first), "{{stage}}"),
                unit="s",
                stacked=True,
                width=12,
                height=10,
            ),
            graph(
                "Whole sequence",
                "Mean seconds per sequence in each stage. decode is generation itself and normally "
                "the most; transfer and decode_queue lie between first and second token.",
                Query(_per_sequence(source), "{{stage}}"),
                unit="s",
                stacked=True,
                width=12,
                height=10,
            ),
        ],
    )


def _each(source: Source) -> Row:
    groups = (
        ("Waiting", ("queue", "route", "prefill_queue", "decode_queue"),
         "In the router, for a worker, in the workers' queues. Whichever grows has its pool too "
         "small, or its limits too low."),
        ("Computing", ("prefill", "first_decode"),
         "Prompts and first decode steps. Growing with equal traffic: larger prompts, or GPUs that "
         "clock down; see Engine and GPU."),
        ("Moving KV", ("transfer",),
         "What of the transfer the prompt's computation did not hide. See KV transfer for the "
         "slow pair."),
        ("Between processes", ("prefill_rpc", "handover_rpc", "tokenize", "deliver"),
         "Network, event loops and slow clients (deliver). Milliseconds here mean a busy router: "
         "add one."),
        ("Lost to failures", ("failed_attempt", "reroute"),
         "Time of attempts that failed. See Router decisions for the causes."),
    )  # fmt: skip
    assert {stage for _, stages, _ in groups for stage in stages} <= set(STAGES)
    return Row(
        "99 of 100 are faster",
        [
            graph(
                title,
                description,
                *quantiles(source, _STAGE, "stage", shares=(0.99,), stage="=~" + "|".join(stages)),
                unit="s",
                empty_when="no attempt failed." if "failed_attempt" in stages else "",
            )
            for title, stages, description in groups
        ],
    )


def _trust(source: Source) -> Row:
    return Row(
        "Can the ledger be trusted",
        [
            number(
                "Time without a cause",
                "Share of the time of requests that no stage explains. Above 5% workers fail to "
                "report their stages: look for requests that end by force.",
                Query(source.now("diptych:unattributed:ratio_rate5m").max()),
                unit="percentunit",
                steps=Steps(warn=0.02, bad=0.05),
                runbooks=("DiptychTimeUnexplained",),
                width=6,
                empty_when="no request ended in the last five minutes.",
            ),
            graph(
                "Reported twice",
                "Seconds per second that workers reported beyond what requests took. Much of it "
                "means clocks of hosts that run apart or stages that overlap.",
                Query(source.rate("diptych_router_overrun_seconds_total").sum(), "overrun"),
                Query(source.rate("diptych_router_unattributed_seconds_total").sum(), "unknown"),
                unit="s",
                width=9,
            ),
            graph(
                "Measured first token, and the sum of its stages",
                "Means of both; they should lie on each other. Where the first is larger the rest "
                "is tokenizing several sequences, or writing to slow clients.",
                Query(source.mean("diptych_router_time_to_first_token_seconds"), "measured"),
                Query(
                    _per_sequence(source, stage="=~" + "|".join(STAGES_TO_FIRST_TOKEN)).sum(),
                    "sum of stages",
                ),
                unit="s",
                width=9,
            ),
        ],
    )


def _per_sequence(source: Source, **matchers: str) -> Vector:
    seconds = source.added(_STAGE, **matchers).sum("stage")
    return seconds.over_one(source.observed("diptych_router_attempts").sum())
