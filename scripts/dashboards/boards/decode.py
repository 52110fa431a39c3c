"""The decode pool: batches, room for KV, and what disturbs the rhythm of tokens."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import against_target, quantiles
from scripts.dashboards.panels import Query, Steps, graph
from scripts.dashboards.promql import Source

_MINE = {"role": "decode"}


def board(source: Source) -> Board:
    """The dashboard of the decode pool."""
    return Board(
        name="decode",
        title="Decode",
        description="Workers that fetch the KV of prompts and generate tokens.",
        role="decode",
        rows=[_load(source), _rhythm(source), _intake(source)],
    )


def _load(source: Source) -> Row:
    held = source.now("diptych_kv_cache_usage_ratio", **_MINE)
    return Row(
        "Load",
        [
            graph(
                "KV in use",
                "Share of each worker's KV blocks that are held. Near 1 sequences are preempted "
                "and new ones wait: add workers, or give each more memory.",
                Query(held, "{{worker}}"),
                unit="percentunit",
                steps=Steps(warn=0.85, bad=0.95),
                runbooks=("DiptychKvCacheFull",),
            ),
            graph(
                "KV blocks",
                "Over the pool. cached ones serve prefixes until they are needed.",
                Query(source.now("diptych_kv_blocks", **_MINE).sum("state"), "{{state}}"),
                stacked=True,
            ),
            graph(
                "Sequences",
                "Running, and waiting for admission.",
                Query(source.now("diptych_requests_running", **_MINE).sum(), "running"),
                Query(source.now("diptych_requests_waiting", **_MINE).sum(), "waiting"),
            ),
            graph(
                "Tokens generated",
                "Per second and worker. Uneven with equal KV use: some GPUs are slower.",
                Query(source.added("diptych_step_tokens", phase="decode", **_MINE).sum("worker"),
                      "{{worker}}"),
                unit="cps",
                stacked=True,
            ),
            graph(
                "Batch",
                "Sequences per step that generates. Small batches waste memory bandwidth: fewer "
                "workers would do; large ones cost each sequence time.",
                Query(source.mean("diptych_step_tokens", "worker", phase="decode", **_MINE),
                      "{{worker}}"),
            ),
            graph(
                "Preemptions",
                "Sequences per second that lost their blocks to older ones and start over. "
                "Anything steady means too little room.",
                Query(source.rate("diptych_preemptions_total", **_MINE).sum("worker"),
                      "{{worker}}"),
                unit="ops",
                runbooks=("DiptychPreemptions",),
            ),
        ],
    )  # fmt: skip


def _rhythm(source: Source) -> Row:
    return Row(
        "Rhythm",
        [
            against_target(
                source,
                "itl",
                "What clients see. Steps to the right that are longer than the target are why.",
                runbooks=("DiptychInterTokenLatencyHigh",),
            ),
            graph(
                "Steps by kind",
                "Time of a step that only decodes, only computes prompts, or both. Long mixed "
                "ones stall every stream: keep prompts off this pool (local_prefill_max_tokens, "
                "more prefill workers) or lower --max-step-tokens.",
                *quantiles(source, "diptych_step_duration_seconds", "kind", shares=(0.5, 0.99),
                           **_MINE),
                unit="s",
            ),
            graph(
                "Prompt tokens computed here",
                "Per second: prompts that were not handed over, and what is left of those that "
                "were. See Router decisions for why.",
                Query(source.added("diptych_step_tokens", phase="prefill", **_MINE).sum("worker"),
                      "{{worker}}"),
                unit="cps",
                stacked=True,
                runbooks=("DiptychPrefillUnused",),
            ),
        ],
    )  # fmt: skip


def _intake(source: Source) -> Row:
    return Row(
        "Intake",
        [
            graph(
                "Hand-overs",
                "Under way, and those among them that wait for KV blocks to read into. Waiting "
                "ones: KV is full here, while prefill holds their blocks too.",
                Query(source.now("diptych_kv_transfers_inflight").sum(), "under way"),
                Query(source.now("diptych_kv_transfers_waiting").sum(), "no blocks yet"),
                runbooks=("DiptychKvCacheFull",),
            ),
            graph(
                "From last block to first step",
                "99 of 100: time a sequence waits here after its KV came, and for its first step.",
                *quantiles(source, "diptych_router_stage_seconds", "stage", shares=(0.99,),
                           stage="=~decode_queue|first_decode"),
                unit="s",
            ),
            graph(
                "Prefix cache",
                "Share of prompt tokens found here. Blocks that are found are not transferred.",
                Query(source.now("diptych:prefix_cache_hit:ratio_rate5m", **_MINE),
                      "{{pool}} {{role}}"),
                unit="percentunit",
                empty_when="no prompt was looked up in the last five minutes.",
            ),
        ],
    )  # fmt: skip
