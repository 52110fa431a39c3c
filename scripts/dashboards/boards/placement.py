"""What routers decide: how phases are spread, who is avoided, who waits."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import quantiles
from scripts.dashboards.panels import Query, Steps, graph
from scripts.dashboards.promql import Source

BY_HAND = "the settings of routers name their workers."


def board(source: Source) -> Board:
    """The dashboard of routers and their decisions."""
    return Board(
        name="router",
        title="Router decisions",
        description="Where requests are sent, how often again, and how the routers themselves do.",
        of_workers=False,
        rows=[
            _modes(source),
            _attempts(source),
            _admission(source),
            _discovery(source),
            _process(source),
        ],
    )


def _modes(source: Source) -> Row:
    routing = "diptych_router_routing_total"
    return Row(
        "Decisions",
        [
            graph(
                "How phases are spread",
                "Attempts per second. disaggregated: KV is handed over; local: decode computes the "
                "prompt because that is cheaper; decode_only and prefill_only: the other pool "
                "could take nothing. GET /v1/requests/{id}/explain says why for one request.",
                Query(source.rate(routing).sum("mode"), "{{mode}}"),
                unit="reqps",
                stacked=True,
            ),
            graph(
                "Handed over",
                "Share of attempts. 0 with prefill workers ready: prompts are too short or too "
                "cached for it, links are slow, or digests of the pools differ.",
                Query(source.now("diptych:disaggregated:ratio_rate5m"), "handed over"),
                unit="percentunit",
                runbooks=("DiptychPrefillUnused",),
                empty_when="nothing was placed in the last five minutes.",
            ),
            graph(
                "Time to decide",
                "Hashing the prompt and choosing the pair. Milliseconds mean a busy router: see "
                "the last row.",
                *quantiles(source, "diptych_router_decision_seconds"),
                unit="s",
            ),
            graph(
                "Workers",
                "By state as routers see them, the largest count over routers. draining is normal "
                "during an upgrade; lost and stalled are not.",
                Query(source.now("diptych_router_workers").max("role", "state"),
                      "{{role}} {{state}}"),
                runbooks=("DiptychWorkersLost", "DiptychNoWorkerReady"),
            ),
            graph(
                "Predicted cache hits",
                "Mean share of the prompt that is expected to be cached where it goes.",
                Query(source.mean("diptych_router_prefix_match_ratio"), "mean"),
                unit="percentunit",
            ),
            graph(
                "Least backlog",
                "Seconds of prompts on the least busy worker, as each router predicts.",
                Query(source.now("diptych_router_backlog_seconds").max("instance"),
                      "{{instance}}"),
                unit="s",
                runbooks=("DiptychPrefillBacklogHigh",),
            ),
        ],
    )  # fmt: skip


def _attempts(source: Source) -> Row:
    return Row(
        "Attempts",
        [
            graph(
                "Attempts per sequence",
                "Mean. Above 1 workers fail or are lost; their requests go on elsewhere.",
                Query(source.mean("diptych_router_attempts"), "mean"),
                steps=Steps(warn=1.05, bad=1.2),
            ),
            graph(
                "Repeated, by cause",
                "Per second.",
                Query(source.rate("diptych_router_retries_total").sum("reason"), "{{reason}}"),
                unit="reqps",
                stacked=True,
                runbooks=("DiptychTransferFailures", "DiptychWorkersLost"),
            ),
            graph(
                "Forgotten by workers",
                "Attempts taken from a worker that brought them no further though it says that it "
                "is well, per second, by stage. first_token: look at prefill, transfer: at decode.",
                Query(source.rate("diptych_router_stuck_total").sum("stage"), "{{stage}}"),
                unit="reqps",
            ),
            graph(
                "Left alone after failures",
                "Workers, and pairs of them, that are not trusted at the moment. One for long: it "
                "takes requests and fails them; its log says why.",
                Query(source.now("diptych_router_breakers_open").max("scope"), "{{scope}}"),
                empty_when="nothing has failed yet.",
            ),
            graph(
                "Shut out, how often",
                "Times per second that failures opened a breaker. A pair that opens again and "
                "again has a bad link; see KV transfer.",
                Query(
                    source.rate("diptych_router_breaker_openings_total").sum("scope"), "{{scope}}"
                ),
                unit="ops",
                empty_when="nothing has failed yet.",
            ),
            graph(
                "Messages that came too late",
                "Per second, about requests that are over: normal after clients leave.",
                Query(source.rate("diptych_router_stale_messages_total").sum(), "stale"),
                unit="ops",
            ),
        ],
    )


def _admission(source: Source) -> Row:
    return Row(
        "Admission",
        [
            graph(
                "Queue",
                "Sequences in the queue of each router. It holds back what workers could not "
                "begin yet, so that order can still change.",
                Query(source.now("diptych_router_generations_queued").max("instance"),
                      "{{instance}}"),
            ),
            graph(
                "Wait in the queue",
                "Long with little backlog: --max-in-flight is too low.",
                *quantiles(source, "diptych_router_queue_wait_seconds"),
                unit="s",
            ),
            graph(
                "Refused with 429",
                "Per second. Clients are told when to come again.",
                Query(source.rate("diptych_router_shed_total").sum("reason"), "{{reason}}"),
                unit="reqps",
                stacked=True,
                runbooks=("DiptychRequestsShed",),
            ),
        ],
    )  # fmt: skip


def _discovery(source: Source) -> Row:
    return Row(
        "Discovery through Kubernetes",
        [
            graph(
                "Listed workers",
                "In EndpointSlices, the largest count over routers; draining: their pods end.",
                Query(source.now("diptych_discovery_members").max("role", "state"),
                      "{{role}} {{state}}"),
                empty_when=BY_HAND,
            ),
            graph(
                "Last word of the API server",
                "Since it confirmed the list: about a minute at most while all is well. Workers "
                "that are known are kept meanwhile.",
                Query(source.now("diptych_discovery_last_sync_age_seconds").max("instance"),
                      "{{instance}}"),
                unit="s",
                steps=Steps(warn=120, bad=300),
                runbooks=("DiptychDiscoveryStale",),
                empty_when=BY_HAND,
            ),
            graph(
                "Requests to the API server",
                "Per second. One watch a minute from each router; anything but ok repeats.",
                Query(source.rate("diptych_discovery_requests_total").sum("verb", "outcome"),
                      "{{verb}} {{outcome}}"),
                unit="reqps",
                runbooks=("DiptychDiscoveryStale",),
                empty_when=BY_HAND,
            ),
            graph(
                "Endpoints that are no workers",
                "In selected slices. role: without the label of one; family: the IPv6 half of a "
                "Service of both; port: none is named grpc; conflict: listed for two pools.",
                Query(source.now("diptych_discovery_ignored_endpoints").max("reason"),
                      "{{reason}}"),
                empty_when=BY_HAND,
            ),
        ],
    )  # fmt: skip


def _process(source: Source) -> Row:
    return Row(
        "Routers themselves",
        [
            graph(
                "Cores in use",
                "A router's event loop has one. Above 0.85 it delays every token: add routers.",
                Query(source.rate("diptych_router_process_cpu_seconds_total").max("instance"),
                      "{{instance}}"),
                steps=Steps(warn=0.7, bad=0.85),
                runbooks=("DiptychRouterBusy",),
            ),
            graph(
                "Memory",
                "Resident. Grows with the index of cached blocks, then stays.",
                Query(
                    source.now("diptych_router_process_resident_memory_bytes").max("instance"),
                    "{{instance}}",
                ),
                unit="bytes",
            ),
            graph(
                "Answers under way",
                "Requests inside each router's API.",
                Query(source.now("diptych_router_requests_in_flight").sum("instance"),
                      "{{instance}}"),
                stacked=True,
            ),
            graph(
                "Open files",
                "Of each router, connections of clients among them. Near the limit new clients are "
                "refused.",
                Query(source.now("diptych_router_process_open_fds").max("instance"), "open"),
                Query(source.now("diptych_router_process_max_fds").min(), "limit"),
            ),
            graph(
                "Full garbage collections",
                "Per second. Each stops the event loop for a moment.",
                Query(source.rate("python_gc_collections_total", generation="2").sum("instance"),
                      "{{instance}}"),
                unit="ops",
            ),
        ],
    )  # fmt: skip
