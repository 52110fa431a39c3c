"""What Ray is asked for, what a placed node is told, and what the leader hears of trouble."""

from pathlib import Path
from typing import Any

import pytest

from prefill.settings import PrefillSettings
from tests.support.nodes import node_settings
from worker.engine_child import settings_values
from worker.exit_status import EXIT_REFUSED
from worker.ray_driver import Driver, RefusedError, bundle_of, node_values


def order(**changes: object) -> dict[str, Any]:
    own = {"tensor_parallel_size": 4, "placement": "ray", "metrics_port": 9101}
    settings = node_settings(Path("model"), **(own | changes))
    return {
        "leader_address": "ten:9001",
        "own_host": settings.own_host,
        "loopback": settings.loopback,
        "values": settings_values(settings),
    }


@pytest.mark.parametrize(
    ("device", "num_threads", "bundle"),
    [
        ("cpu", 3, {"CPU": 3}),
        ("cpu", None, {"CPU": 2}),
        ("cuda", None, {"CPU": 2, "GPU": 2}),
    ],
)
def test_a_host_is_asked_for_what_its_node_computes_with(
    device: str, num_threads: int | None, bundle: dict[str, float]
) -> None:
    assert bundle_of(order(device=device, num_threads=num_threads)["values"]) == bundle


@pytest.mark.parametrize(
    ("changes", "ray_host", "host", "own_host", "metrics_port"),
    [
        ({"host": "10.0.0.1"}, "10.0.0.2", "10.0.0.2", "10.0.0.2", 9101),
        (
            {"host": "0.0.0.0", "advertise_host": "10.0.0.1", "ray_strategy": "pack"},
            *("10.0.0.2", "0.0.0.0", "10.0.0.2", 0),
        ),
        ({}, "10.0.0.1", "127.0.0.1", "127.0.0.1", 9101),
    ],
)
def test_a_placed_node_is_told_all_that_the_leader_knows_and_where_it_is(
    changes: dict[str, object], ray_host: str, host: str, own_host: str, metrics_port: int
) -> None:
    told = node_values(order(**changes), 1, ray_host)
    node = PrefillSettings.model_validate(told)
    assert (node.node_rank, node.leader_address, node.placement) == (1, "ten:9001", "manual")
    assert (node.host, node.own_host, node.metrics_port) == (host, own_host, metrics_port)
    assert node.auth_token is not None and node.auth_token.get_secret_value() == "test-token"
    assert (node.tensor_parallel_size, node.num_threads) == (4, 1)


def test_gpus_that_ray_keeps_for_the_leader_must_be_those_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Driver(None, order(host="10.0.0.1"), 1)
    there = ("10.0.0.2", ["0", "1"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver.check([("10.0.0.1", ["0", "1"]), there])
    with pytest.raises(RefusedError, match="CUDA_VISIBLE_DEVICES=2,3") as caught:
        driver.check([("10.0.0.1", ["2", "3"]), there])
    assert caught.value.status == EXIT_REFUSED
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    driver.check([("10.0.0.1", ["2", "3"]), there])


def test_a_leader_on_loopback_can_not_lead_other_hosts() -> None:
    driver = Driver(None, order(), 1)
    driver.check([("10.0.0.1", []), ("10.0.0.1", [])])
    with pytest.raises(RefusedError, match=r"Nodes at 10\.0\.0\.2 can't connect"):
        driver.check([("10.0.0.1", []), ("10.0.0.2", [])])
