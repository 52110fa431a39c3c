"""Is each pool of the right size: the signals that scale it, and what was made of them."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import against_target
from scripts.dashboards.boards.overview import ready_workers
from scripts.dashboards.panels import Query, Steps, graph
from scripts.dashboards.promql import Source


def board(source: Source) -> Board:
    """The dashboard of sizes."""
    return Board(
        name="autoscaling",
        title="Autoscaling",
        description="Prefill scales on seconds of backlog, decode on KV in use and on token gaps.",
        rows=[_prefill(source), _decode(source), _sizes(source)],
    )


def _prefill(source: Source) -> Row:
    backlog = source.now("diptych:prefill_backlog_seconds", role="prefill")
    return Row(
        "Prefill: what asks for more",
        [
            graph(
                "Backlog",
                "Seconds of prompts per worker: mean and worst. Scale out above half of the "
                "target for the first token, in below a tenth.",
                Query(backlog.sum() / backlog.count(), "mean"),
                Query(backlog.max(), "worst"),
                unit="s",
                runbooks=("DiptychPrefillBacklogHigh",),
                empty_when="no worker has measured its rate of prefill yet.",
            ),
            against_target(
                source,
                "ttft",
                "What the size of this pool is for. Above its target with no backlog: more "
                "workers do not help; see Where time goes.",
                runbooks=("DiptychTimeToFirstTokenHigh",),
            ),
            graph(
                "Prompt tokens per ready worker",
                "Per second that are really computed; against the measured rate it is the pool's "
                "utilisation.",
                Query(
                    source.added("diptych_step_tokens", phase="prefill", role="prefill").sum()
                    / source.now("diptych_worker_ready", role="prefill").sum(),
                    "computed",
                ),
                Query(
                    source.now("diptych_prefill_tokens_per_second", role="prefill").sum()
                    / source.now("diptych_worker_ready", role="prefill").sum(),
                    "could be",
                ),
                unit="cps",
            ),
        ],
    )


def _decode(source: Source) -> Row:
    return Row(
        "Decode: what asks for more",
        [
            graph(
                "KV in use",
                "Mean over each decode pool. Scale out above 85%, in when half the workers would "
                "hold it.",
                Query(source.now("diptych:kv_usage:ratio", role="decode"), "{{pool}} {{role}}"),
                unit="percentunit",
                steps=Steps(warn=0.85, bad=0.95),
                runbooks=("DiptychKvCacheFull",),
            ),
            against_target(
                source,
                "itl",
                "What the size of this pool is for, besides room. Above the target with room left: "
                "batches are too large, more workers help.",
                runbooks=("DiptychInterTokenLatencyHigh",),
            ),
            graph(
                "Sequences per ready worker",
                "Running on decode workers.",
                Query(
                    source.now("diptych_requests_running", role="decode").sum()
                    / source.now("diptych_worker_ready", role="decode").sum(),
                    "running",
                ),
            ),
        ],
    )


def _sizes(source: Source) -> Row:
    kube = "kube-state-metrics is not scraped, or nothing scales the pools."
    own = "`diptych autoscale` does not run."
    hpa = "horizontalpodautoscaler"
    return Row(
        "Sizes",
        [
            graph(
                "Ready workers",
                "As routers see them.",
                Query(ready_workers(source, "prefill"), "prefill"),
                Query(ready_workers(source, "decode"), "decode"),
            ),
            graph(
                "Prefill workers per decode worker",
                "It should follow the mix of prompt and output tokens; a ratio that drifts while "
                "the mix stays means that one of the two scales on the wrong signal.",
                Query(
                    ready_workers(source, "prefill") / ready_workers(source, "decode"), "workers"
                ),
                Query(
                    source.rate("diptych_router_prompt_tokens_total").sum()
                    / (source.rate("diptych_router_generation_tokens_total").sum() > 0),
                    "tokens",
                ),
            ),
            graph(
                "Wanted, there, and allowed",
                "Replicas by autoscaler. Wanted at the allowed most for long: raise it. Wanted "
                "above there: no node has room, or workers take long to start.",
                *(
                    Query(
                        source.now(f"kube_{hpa}_{name}_replicas").max(hpa), f"{{{{{hpa}}}}} {text}"
                    )
                    for name, text in (
                        ("status_desired", "wanted"),
                        ("status_current", "there"),
                        ("spec_max", "allowed"),
                    )
                ),
                empty_when=kube,
            ),
            graph(
                "What diptych autoscale sees",
                "Each signal over its target: above 1 for long it adds replicas, unless the most "
                "that is allowed is reached. Gone: it has no fresh signals, and changes nothing.",
                Query(
                    source.now("diptych_autoscale_signal_ratio").max("role", "signal"),
                    "{{role}} {{signal}}",
                ),
                unit="percentunit",
                empty_when=own,
            ),
            graph(
                "Decisions of diptych autoscale",
                "Changes of a scale, and turns that ended without a decision, by what was missing: "
                "its log says more.",
                Query(
                    source.increase("diptych_autoscale_changes_total").sum("role", "direction"),
                    "{{role}} {{direction}}",
                ),
                Query(
                    source.increase("diptych_autoscale_failures_total").sum("role", "missing"),
                    "{{role}} without {{missing}}",
                ),
                empty_when=own,
            ),
            graph(
                "Time to start",
                "Seconds that each worker took to load its model; scaling out can't be faster.",
                Query(source.now("diptych_worker_startup_seconds").max("worker"), "{{worker}}"),
                unit="s",
                runbooks=("DiptychWorkerNotReady",),
            ),
            graph(
                "Refused or held back",
                "Requests refused per second, and such as wait in queues: what too small a size "
                "costs clients.",
                Query(source.rate("diptych_router_shed_total").sum(), "refused"),
                Query(source.now("diptych_router_generations_queued").sum(), "queued"),
                runbooks=("DiptychRequestsShed",),
            ),
        ],
    )
