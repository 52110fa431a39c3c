"""What workers count without being asked matches what their state machines count."""

import inspect
import re

import pytest

import decode.metrics
import kvtransfer.export
import kvtransfer.handover
import prefill.metrics
from rpc.v1 import worker_pb2
from worker.service import EngineView

KIND = re.compile(r'counters\["(\w+)"\]')


@pytest.mark.parametrize(
    ("shown", "machine"),
    [
        (prefill.metrics.ODDITIES, kvtransfer.export),
        (decode.metrics.ODDITIES, kvtransfer.handover),
    ],
)
def test_every_kind_of_oddity_shows_from_the_start(shown: tuple[str, ...], machine: object) -> None:
    assert set(shown) == set(KIND.findall(inspect.getsource(machine)))  # type: ignore[arg-type]


def test_the_time_to_start_stands_still_once_the_engine_is_built() -> None:
    now = [10.0]
    view = EngineView(stall_after_s=5, clock=lambda: now[0])
    now[0] = 12.0
    assert view.startup_s == 2.0
    view.on_ready(worker_pb2.WorkerDescription())
    now[0] = 20.0
    assert view.startup_s == 2.0
