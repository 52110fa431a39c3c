"""Soaks the whole system in failures: real processes, seeded blows, every answer checked.

    python -m benchmarks.chaos --minutes 10 --seed 1

Runs round after round, each with the next seed, and prints what came of it. A round that found
something prints its plan, so that `--seed N --rounds 1` plays it again, and the exit status is 1.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.chaos import make_model, run_chaos
from tests.support.chaos_plan import ChaosPlan


def main() -> int:
    """Run rounds until the time is over; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="Start no round after this.")
    parser.add_argument("--rounds", type=int, default=10**6, help="Most rounds.")
    parser.add_argument("--seed", type=int, default=1, help="Of the first round.")
    parser.add_argument("--requests", type=int, default=200, help="Per round.")
    parser.add_argument("--duration", type=float, default=40.0, help="Of a round's blows, seconds.")
    parser.add_argument("--transport", default="tcp", help="How KV moves.")
    parser.add_argument("--vary", action="store_true", help="Other settings with every seed.")
    parser.add_argument("--logs", type=Path, help="Folder for the logs of rounds that failed.")
    given = parser.parse_args()
    # As at an interrupt: the processes of a round end with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    end = time.monotonic() + 60 * given.minutes
    bad = rounds = 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        while rounds < given.rounds and time.monotonic() < end:
            plan = ChaosPlan(
                seed=given.seed + rounds,
                requests=given.requests,
                duration_s=given.duration,
                transport=given.transport,
                vary=given.vary,
            )
            report = run_chaos(model, plan)
            rounds += 1
            bad += bool(report.failures)
            print(
                report if report.failures else f"seed {plan.seed}: {dict(report.retries)}",
                flush=True,
            )
            if report.failures and given.logs:
                given.logs.mkdir(parents=True, exist_ok=True)
                (given.logs / f"seed-{plan.seed}.log").write_text(report.log)
    print(f"{rounds} rounds, {bad} with failures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
