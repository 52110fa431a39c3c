import pytest

from core.errors import ConfigError
from core.settings import load
from router.fleet.discovery import Member, StaticDiscovery
from router.fleet.worker import Role
from router.settings import RouterSettings
from tests.support.discovery import Told


def load_router(*argv: str) -> RouterSettings:
    return load(RouterSettings, argv, prog="diptych router", env_prefix="DIPTYCH_TEST_")


async def test_lists_of_workers_come_from_one_word() -> None:
    settings = load_router("--prefill", "a:1,b:2", "--decode", "c:4,[::1]:3")
    told = Told()
    await StaticDiscovery(settings.prefill, settings.decode).run(told)
    assert told.members == {
        "a:1": Member(role=Role.PREFILL),
        "b:2": Member(role=Role.PREFILL),
        "c:4": Member(role=Role.DECODE),
        "[::1]:3": Member(role=Role.DECODE),
    }


def test_workers_are_named_or_found_but_not_both() -> None:
    assert load_router("--discovery", "kubernetes").kubernetes_namespace is None
    with pytest.raises(ConfigError, match="leave them out"):
        load_router("--discovery", "kubernetes", "--decode", "c:4")


@pytest.mark.parametrize("address", ["a", "a:0", "a:65536", ":1", "a b:1", "http://a:1"])
def test_wrong_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9001"):
        load_router("--prefill", address)


def test_worker_in_both_pools_is_refused() -> None:
    with pytest.raises(ConfigError, match="a:1"):
        StaticDiscovery(["a:1"], ["a:1"])


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill"):
        StaticDiscovery([], [])
