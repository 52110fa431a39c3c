"""The loads of the serving benchmark and what it keeps of them."""

import argparse

from benchmarks.gpu_serving import reported, unit, workloads
from diptych.bench.streaming import Outcome
from diptych.bench.summary import summary
from router.api.slo import SloTargets


def test_every_size_and_rate_is_a_load_of_its_own() -> None:
    arguments = argparse.Namespace(loads=["64/8@2,4"], seconds=20, trace=None)
    slow, fast = workloads(arguments, vocab=1000)
    assert (slow[0], fast[0]) == ("64/8 at 2/s", "64/8 at 4/s")
    assert 20 < len(slow[1]) < len(fast[1])
    assert slow[2].write(slow[1][0]) != fast[2].write(fast[1][0])
    prompt = slow[2].write(slow[1][0])
    assert len(prompt) == 64 and isinstance(prompt, list) and max(prompt) < 1000


def test_what_is_kept_has_units() -> None:
    good = Outcome(times=[0.1, 0.2, 0.3], ended_s=0.3, output_tokens=3)
    found = reported(summary([good, Outcome(cause="timeout", ended_s=1.0)], SloTargets()))
    assert found["failed"] == 1
    assert (found["ttft_p50_ms"], unit("ttft_p50_ms")) == (100, "ms")
    assert found["output_tokens_per_s"] == 3
    assert "ttft_p50_ms" not in reported(summary([Outcome(cause="timeout")], SloTargets()))
