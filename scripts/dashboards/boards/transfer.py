"""KV on its way: every pair of a prefill and a decode worker, speeds, failures."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import quantiles
from scripts.dashboards.panels import Query, distribution, graph, listing, matrix
from scripts.dashboards.promql import Source

_PAIR = ("worker", "peer")
_MOVED = "diptych_kv_link_read_bytes_total"


def board(source: Source) -> Board:
    """The dashboard of transfers."""
    return Board(
        name="transfer",
        title="KV transfer",
        description="How KV gets from prefill workers (peer) to decode workers (worker).",
        role="decode",
        rows=[_pairs(source), _volume(source), _trouble(source)],
    )


def _pairs(source: Source) -> Row:
    return Row(
        "Pairs",
        [
            matrix(
                "Speed of each link",
                "Measured READs, bytes per second; a row for each decode, a column for each "
                "prefill worker. One red cell is a bad path between two hosts, a red row or "
                "column a bad host; all alike and low, a transport that fell back.",
                Query(source.now("diptych_kv_link_bytes_per_second").max(*_PAIR)),
                rows="worker",
                columns="peer",
                unit="Bps",
                colours="continuous-RdYlGr",
                width=12,
                height=10,
                runbooks=("DiptychLinkSlow", "DiptychTransportMixed"),
            ),
            matrix(
                "Bytes moved by each pair",
                "Per second. Uneven with one model and even load: topology labels or caches pull "
                "requests together; see Router decisions.",
                Query(source.rate(_MOVED).sum(*_PAIR)),
                rows="worker",
                columns="peer",
                unit="Bps",
                width=12,
                height=10,
            ),
            matrix(
                "Latency of each link",
                "Least time that a READ of one block took. Tens of microseconds within a fabric; "
                "milliseconds mean tcp over a far network.",
                Query(source.now("diptych_kv_link_latency_seconds").max(*_PAIR)),
                rows="worker",
                columns="peer",
                unit="s",
                colours="continuous-GrYlRd",
                width=12,
                height=10,
            ),
            listing(
                "Transport of each link",
                "What KV comes by. tcp where nixl is expected: no RDMA device in the pod, or "
                "kv_transport is set; the worker's log says what was missing.",
                Query(source.now("diptych_kv_link_bytes_per_second").max(*_PAIR, "transport")),
                columns=("worker", "peer", "transport"),
                value="bytes per second",
                unit="Bps",
                width=12,
                height=10,
                runbooks=("DiptychTransportMixed",),
            ),
        ],
    )


def _volume(source: Source) -> Row:
    return Row(
        "Volume and time",
        [
            graph(
                "KV moved",
                "Bytes per second of prompts, by transport.",
                Query(source.rate("diptych_kv_transfer_bytes_total").sum("transport"),
                      "{{transport}}"),
                unit="Bps",
                stacked=True,
            ),
            graph(
                "Wait for the last block",
                "From the end of the prompt's computation to the last block read: what the "
                "transfer costs a request. Compare with the stage transfer.",
                *quantiles(source, "diptych_kv_transfer_duration_seconds", "transport"),
                unit="s",
            ),
            distribution(
                "Wait for the last block, all of it",
                "A second band far above the first is one slow link, or READs that wait for "
                "each other.",
                Query(source.buckets("diptych_kv_transfer_duration_seconds")),
            ),
            graph(
                "Speed of READs",
                "Bytes over time of the READs of each decode worker, probes included. Falls with "
                "small prompts; compare with the links above.",
                Query(
                    source.rate(_MOVED).sum("worker")
                    / source.rate("diptych_kv_link_read_seconds_total").sum("worker"),
                    "{{worker}}",
                ),
                unit="Bps",
            ),
            graph(
                "Under way",
                "Hand-overs on decode workers, and blocks that leases hold on prefill workers.",
                Query(source.now("diptych_kv_transfers_inflight").sum(), "hand-overs"),
                Query(source.now("diptych_kv_transfers_waiting").sum(), "waiting for blocks"),
            ),
            graph(
                "Bytes per hand-over",
                "Mean. 0 for prompts that the decode worker had cached.",
                Query(
                    source.rate("diptych_kv_transfer_bytes_total").sum()
                    / source.observed("diptych_kv_transfer_duration_seconds").sum(),
                    "mean",
                ),
                unit="bytes",
            ),
        ],
    )  # fmt: skip


def _trouble(source: Source) -> Row:
    return Row(
        "Trouble",
        [
            graph(
                "Hand-overs that failed",
                "Per second by cause. worker_lost: a prefill worker went; kv_transfer_failed: a "
                "READ or a lease failed, the log of the decode worker says which.",
                Query(source.rate("diptych_kv_transfer_failures_total").sum("reason"),
                      "{{reason}}"),
                unit="ops",
                stacked=True,
                runbooks=("DiptychTransferFailures",),
            ),
            graph(
                "Out of the ordinary on decode",
                "Messages and ends that should be rare, per second. silent_peer and stuck_read: "
                "the network; lapsed_lease: the reader was too slow; doubt: blocks are kept aside "
                "until a READ is known to be over.",
                Query(source.rate("diptych_kv_handover_oddities_total").sum("kind"), "{{kind}}"),
                unit="ops",
            ),
            graph(
                "Probes",
                "Tests of new links and measurements of unused ones, per second. failed ones: the "
                "link is up, but READs over it do not work.",
                Query(source.rate("diptych_kv_link_probes_total").sum("outcome"), "{{outcome}}"),
                unit="ops",
            ),
            graph(
                "Links that move no KV",
                "Decode workers to which no test block comes from that prefill worker as it was "
                "sent. Nothing is handed over between them; decode's log says why.",
                Query(source.now("diptych_kv_link_failing").sum("peer"), "{{peer}}"),
                empty_when="no link was opened yet.",
                runbooks=("DiptychLinkFailing",),
            ),
        ],
    )  # fmt: skip
