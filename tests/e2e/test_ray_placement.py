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
from tests.support.ray_cluster import CORES, RAY_ENV, RayCluster, ray_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    with ray_cluster() as running_ray:
        yield running_ray


@pytest.fixture(autouse=True)
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RAY_ENV.items():
        monkeypatch.setenv(name, value)


def by_ray(ray: RayCluster, **changes: object) -> dict[str, object]:
    own = {"nodes": 2, "tensor_parallel_size": 2, "placement": "ray", "ray_address": ray.address}
    return {**own, "rendezvous_port": 0, **changes}


def test_a_node_that_ray_placed_serves_and_the_worker_ends_with_its_actor(
    tmp_path: Path, ray: RayCluster
) -> None:
    model = make_checkpoint(tmp_path)
    placed = by_ray(ray, ray_strategy="pack")
    with cluster(model, transport="tcp", worker=STEP, prefill_worker=placed) as system:
        leader = system.prefill[0].process
        assert leader is not None
        leader.wait_for_line("Ray placed node 1 on 127.0.0.1", 5)
        assert answer(system, PROMPT) == ("disaggregated", expected(model, PROMPT))
        system.wait_balanced()

        actor = next(pid for pid in ray.actors() if descendants(pid))
        node = [actor, *descendants(actor)]
        below = [*descendants(leader.pid), *node]
        assert not any(TOKEN in command_line(pid) for pid in below)
        for pid in node:
            assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert b"joined the leader" in ray.bytes_kept()
        assert TOKEN.encode() not in ray.bytes_kept()

        os.kill(actor, signal.SIGKILL)
        assert leader.wait(20) == 3, leader.log
        assert "Node 1 (127.0.0.1) was lost: " in leader.log
        wait_until(lambda: not any(alive(pid) for pid in below), 20, "every process to end")
        wait_until(lambda: not ray.actors(), 10, "Ray to take back what it gave")


def test_where_nodes_can_not_be_spread_the_worker_says_what_ray_has_and_ends(
    tmp_path: Path, ray: RayCluster
) -> None:
    options = {
        **by_ray(ray, num_threads=1, start_timeout_s="8s", device="cpu", port=free_port()),
        "model": make_checkpoint(tmp_path),
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    with running([sys.executable, "-m", "prefill", *flags]) as leader:
        assert leader.wait(30) == 3
    said = next(line for line in leader.log.splitlines() if "Ray has no room" in line)
    assert "2 nodes were asked for, each on a host of its own, one of them here, with 1 CPU" in said
    assert f"Ray has 127.0.0.1: {CORES} CPU, 0 GPU; free of all: {CORES} CPU" in said
