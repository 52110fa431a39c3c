"""Workers whose other nodes Ray places and starts, in the whole system."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.test_tensor_parallel import PROMPT, STEP, answer, expected
from tests.support.cluster import TOKEN, cluster
from tests.support.models import make_checkpoint
from tests.support.process import alive, command_line, descendants, free_port, running, wait_until
from tests.support.ray_cluster import RayCluster, ray_cluster

pytestmark = pytest.mark.slow
HIDDEN = "not-for-rays-eyes"


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    with ray_cluster() as running_ray:
        yield running_ray


def by_ray(ray: RayCluster, **changes: object) -> dict[str, object]:
    own = {"nodes": 2, "tensor_parallel_size": 2, "placement": "ray", "ray_address": ray.address}
    return {**own, "rendezvous_port": 0, "metrics_port": 0, **changes}


def test_a_node_that_ray_placed_serves_and_the_worker_ends_with_its_actor(
    tmp_path: Path, ray: RayCluster
) -> None:
    model = make_checkpoint(tmp_path)
    with cluster(model, transport="tcp", worker=STEP, prefill_worker=by_ray(ray)) as system:
        (prefill,) = system.prefill
        leader = prefill.process
        assert leader is not None
        leader.wait_for_line("Ray placed node 1 on 127.0.0.3", 5)
        assert answer(system, PROMPT) == ("disaggregated", expected(model, PROMPT))
        system.wait_balanced()

        actor = next(pid for pid in ray.actors() if descendants(pid))
        below = [*descendants(leader.pid), *descendants(actor)]
        for pid in (*below, *ray.actors()):
            assert TOKEN not in command_line(pid)
            assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert TOKEN.encode() not in ray.bytes_kept()

        os.kill(actor, signal.SIGKILL)
        assert leader.wait(20) == 3
        assert "Node 1 (127.0.0.3) was lost: " in leader.log
        wait_until(lambda: not any(alive(pid) for pid in below), 20, "every process to end")
        wait_until(lambda: not ray.actors(), 10, "Ray to take back what it gave")
