"""How near `diptych plan` comes to the placement simulator, which places as the router does.

    python -m benchmarks.planning --trace mooncake_conversation_trace.jsonl --save

Both play the same trace on the same modelled replicas. The planner takes all prefill replicas for
one queue and all caches for one; the simulator has a queue and a cache per replica, and the
router's own placement, prices and index in front of them.
"""

import argparse
from pathlib import Path

from benchmarks.modelled_hardware import llama_70b_on_eight_h200
from benchmarks.placement_simulator import SLO_TPOT_S, SLO_TTFT_S, Fleet, judge, simulate
from benchmarks.placement_simulator import make_policy as policy_of
from benchmarks.report import Report
from diptych.planning.fleet import Slo
from diptych.planning.search import Bench, Caches
from diptych.planning.search import Fleet as Size
from diptych.planning.trace import BLOCK_SIZE, faster, read_trace

SIZES = ((5, 1), (6, 1), (6, 2), (7, 2), (8, 2))
CACHE_BLOCKS = 10_000


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--speed", type=float, default=4.0, help="seconds of trace in one second")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    requests = faster(read_trace(arguments.trace), arguments.speed)
    rates = llama_70b_on_eight_h200()
    slo = Slo(ttft_s=SLO_TTFT_S, tpot_s=SLO_TPOT_S, share=0.9)
    bench = Bench(requests, Caches(tokens_per_replica=CACHE_BLOCKS * BLOCK_SIZE), rates, slo)
    report = Report("planning", {**vars(arguments), "trace": arguments.trace.name})
    for prefill, decode in SIZES:
        fleet = Fleet(prefill=prefill, decode=decode, copies=1, window_s=0.0)
        policy = policy_of("ours", fleet, rates, CACHE_BLOCKS)
        placed = judge(simulate(requests, policy, fleet, rates, CACHE_BLOCKS), 0.0)
        planned = bench.outcome(Size(prefill=prefill, decode=decode))
        where = f"{prefill} prefill + {decode} decode"
        report.add(f"{where}: within the SLO, planned", planned.good, "x")
        report.add(f"{where}: within the SLO, simulated", placed.good, "x")
    if arguments.save:
        print(report.save())


if __name__ == "__main__":
    main()
