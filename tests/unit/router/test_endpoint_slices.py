from typing import Any

import pytest

from router.fleet.discovery import Member
from router.fleet.kubernetes.slices import Ignored
from router.fleet.worker import Place, Role
from tests.support.kube.slices import census_of, endpoint, endpoint_slice


def addresses(*slices: dict[str, Any]) -> set[str]:
    return set(census_of(slices).members)


def test_labels_say_role_and_pool_and_the_endpoint_says_where() -> None:
    item = endpoint_slice(
        "a", [endpoint("10.0.0.1", zone="z1", node="n1")], role="prefill", pool="big"
    )
    place = Place(zone="z1", host="n1")
    assert census_of([item]).members == {
        "10.0.0.1:9001": Member(role=Role.PREFILL, pool="big", place=place)
    }


def test_slices_of_one_service_are_gathered() -> None:
    slices = [endpoint_slice("a", ["10.0.0.1"]), endpoint_slice("b", ["10.0.0.2"], port=9002)]
    assert addresses(*slices) == {"10.0.0.1:9001", "10.0.0.2:9002"}


def test_pod_of_two_families_counts_once() -> None:
    four = endpoint_slice("a-4", ["10.0.0.1"])
    six = endpoint_slice("a-6", ["fd00::1"], family="IPv6")
    assert addresses(six, four) == {"10.0.0.1:9001"}
    assert census_of([six, four]).ignored == {Ignored.FAMILY: 1}
    assert addresses(six) == {"[fd00::1]:9001"}
    other = endpoint_slice("b-6", ["fd00::2"], family="IPv6", service="other")
    assert addresses(four, other) == {"10.0.0.1:9001", "[fd00::2]:9001"}


@pytest.mark.parametrize("serving", [True, False])
def test_terminating_pod_drains_whether_it_serves_or_not(serving: bool) -> None:
    item = endpoint_slice("a", [endpoint("10.0.0.1", terminating=True, serving=serving)])
    assert census_of([item]).members["10.0.0.1:9001"].draining


def test_pod_that_is_not_ready_is_left_to_the_router_to_judge() -> None:
    item = endpoint_slice("a", [endpoint("10.0.0.1", serving=False)])
    item["endpoints"][0]["conditions"] = {"ready": False, "serving": False}
    assert not census_of([item]).members["10.0.0.1:9001"].draining


@pytest.mark.parametrize("first", ["a", "z"], ids=["old first", "old last"])
def test_new_pod_at_the_address_of_one_that_ends_is_not_drained(first: str) -> None:
    old = endpoint_slice(first, [endpoint("10.0.0.1", terminating=True)])
    assert not census_of([old, endpoint_slice("m", ["10.0.0.1"])]).members["10.0.0.1:9001"].draining


def test_address_of_two_pools_stays_in_the_first_by_name() -> None:
    slices = [endpoint_slice("a", ["10.0.0.1"]), endpoint_slice("b", ["10.0.0.1"], pool="other")]
    for order in (slices, slices[::-1]):
        found = census_of(order)
        assert found.members["10.0.0.1:9001"].pool == "decode"
        assert found.ignored == {Ignored.CONFLICT: 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metadata": {"name": "a"}}, Ignored.ROLE),
        ({"metadata": {"name": "a", "labels": {"diptych.io/role": "router"}}}, Ignored.ROLE),
        ({"ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}, Ignored.PORT),
        ({"ports": [{"name": "grpc", "port": 80, "protocol": "UDP"}]}, Ignored.PORT),
        ({"ports": None}, Ignored.PORT),
        ({"addressType": "FQDN"}, Ignored.FAMILY),
        ({"endpoints": [{"conditions": {}}]}, Ignored.ADDRESS),
        ({"endpoints": [{"addresses": []}]}, Ignored.ADDRESS),
    ],
)
def test_what_is_no_worker_is_left_out_and_counted(change: dict[str, Any], reason: Ignored) -> None:
    odd = endpoint_slice("a", ["10.0.0.1"]) | change
    found = census_of([odd, endpoint_slice("b", ["10.0.0.2"], service="other")])
    assert set(found.members) == {"10.0.0.2:9001"}
    assert found.ignored == {reason: 1}
