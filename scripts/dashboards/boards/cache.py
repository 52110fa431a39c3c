"""The prefix cache: what it spares, in which tier, and whether routers know what is where."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.panels import Query, distribution, graph
from scripts.dashboards.promql import Source

_HIT = "diptych_prefix_cache_hit_tokens_total"
_TIER_HIT = "diptych_kv_tier_hit_tokens_total"


def board(source: Source) -> Board:
    """The dashboard of the caches."""
    return Board(
        name="cache",
        title="Cache",
        description="Prompt tokens that need not be computed, and the memory that it takes.",
        rows=[_hits(source), _tiers(source), _index(source)],
    )


def _hits(source: Source) -> Row:
    by_role = ("role",)
    return Row(
        "Hits",
        [
            graph(
                "Hit ratio",
                "Share of prompt tokens looked up that were cached, by pool. What it can reach is "
                "given by the traffic; a fall means eviction or requests that are spread wider.",
                Query(source.now("diptych:prefix_cache_hit:ratio_rate5m"), "{{role}} {{pool}}"),
                unit="percentunit",
                empty_when="no prompt was looked up in the last five minutes.",
            ),
            graph(
                "Hit tokens by tier, and misses",
                "Per second, prefill and decode together. A large host part is worth its memory; "
                "misses beside much eviction ask for more.",
                Query(source.rate(_HIT).sum() - source.rate(_TIER_HIT).sum(), "device"),
                Query(source.rate(_TIER_HIT).sum("tier"), "{{tier}}"),
                Query(
                    source.rate("diptych_prefix_cache_lookup_tokens_total").sum()
                    - source.rate(_HIT).sum(),
                    "missed",
                ),
                unit="cps",
                stacked=True,
            ),
            graph(
                "Spared, as clients see it",
                "Share of the prompt tokens of completed sequences that a worker's cache spared.",
                Query(
                    source.rate("diptych_router_cached_tokens_total").sum()
                    / (source.added("diptych_router_sequence_prompt_tokens").sum() > 0),
                    "cached",
                ),
                unit="percentunit",
                empty_when="no sequence was completed.",
            ),
            graph(
                "Device blocks",
                "Of all workers. With no free ones left every new block evicts a cached one.",
                Query(source.now("diptych_kv_blocks").sum("state"), "{{state}}"),
                stacked=True,
            ),
            graph(
                "Blocks kept for prefixes",
                "Cached blocks on each pool's workers; what a burst of requests pushes out first.",
                Query(source.now("diptych_kv_blocks", state="cached").sum(*by_role, "worker"),
                      "{{worker}}"),
                stacked=True,
            ),
        ],
    )  # fmt: skip


def _tiers(source: Source) -> Row:
    none = "no worker has --host-kv-memory."
    return Row(
        "Tiers below the device",
        [
            graph(
                "Blocks",
                "Of each tier. held ones are being copied; free ones left over mean more memory "
                "than is of use.",
                Query(source.now("diptych_kv_tier_blocks").sum("tier", "state"),
                      "{{tier}} {{state}}"),
                stacked=True,
                empty_when=none,
            ),
            graph(
                "Copies",
                "Bytes per second: in is saved before eviction, out is brought back. Much in and "
                "little out: prefixes do not come again, the tier costs more than it gives.",
                Query(source.rate("diptych_kv_tier_bytes_total").sum("tier", "direction"),
                      "{{tier}} {{direction}}"),
                unit="Bps",
                empty_when=none,
            ),
            graph(
                "Evicted before they were saved",
                "Blocks per second that are lost to the tier. Steady: blocks turn over faster than "
                "they can be copied.",
                Query(source.rate("diptych_kv_tier_lost_blocks_total").sum("worker"),
                      "{{worker}}"),
                unit="ops",
                empty_when=none,
            ),
            graph(
                "Measured speed of copies",
                "Bytes per second between device and tier. On a GPU a fraction of what PCIe gives "
                "means memory that is not pinned, or another NUMA node.",
                Query(source.now("diptych_kv_tier_bytes_per_second").max("worker", "tier"),
                      "{{worker}} {{tier}}"),
                unit="Bps",
                empty_when=none,
            ),
        ],
    )  # fmt: skip


def _index(source: Source) -> Row:
    return Row(
        "What routers know",
        [
            distribution(
                "Predicted hits",
                "Share of each prompt that the router expects to be cached where it sends it.",
                Query(source.buckets("diptych_router_prefix_match_ratio")),
                unit="percentunit",
            ),
            graph(
                "Predicted and actual",
                "Means over prompts, and over their tokens. Far apart: the index is stale; see "
                "the events to the right.",
                Query(source.mean("diptych_router_prefix_match_ratio"), "predicted, per attempt"),
                Query(
                    source.rate("diptych_router_cached_tokens_total").sum()
                    / (source.added("diptych_router_sequence_prompt_tokens").sum() > 0),
                    "actual, per token",
                ),
                unit="percentunit",
            ),
            graph(
                "Blocks in the index",
                "Distinct blocks that each router knows of. Routers that differ for long have "
                "lost events.",
                Query(source.now("diptych_router_indexed_blocks").max("instance"), "{{instance}}"),
            ),
            graph(
                "Cache events",
                "Per second by what became of them. needs_resync: events were lost and a snapshot "
                "was asked for.",
                Query(source.rate("diptych_router_cache_events_total").sum("outcome"),
                      "{{outcome}}"),
                unit="ops",
            ),
            graph(
                "Snapshots asked for",
                "Per second. More than at a restart of a worker: streams to workers break, or a "
                "router is too busy to read them.",
                Query(source.rate("diptych_router_resyncs_total").sum("instance"), "{{instance}}"),
                unit="ops",
                runbooks=("DiptychCacheIndexLosesEvents",),
            ),
        ],
    )  # fmt: skip
