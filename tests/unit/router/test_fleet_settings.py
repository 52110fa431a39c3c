import pytest

from core.errors import ConfigError
from core.settings import load
from router.fleet.discovery import static_members
from router.fleet.worker import Role
from router.settings import RouterSettings


def load_router(*argv: str) -> RouterSettings:
    return load(RouterSettings, argv, prog="diptych router", env_prefix="DIPTYCH_TEST_")


def test_lists_of_workers_come_from_one_word() -> None:
    settings = load_router("--prefill", "a:1,b:2", "--decode", "c:4,[::1]:3")
    assert static_members(settings.prefill, settings.decode) == {
        "a:1": Role.PREFILL,
        "b:2": Role.PREFILL,
        "c:4": Role.DECODE,
        "[::1]:3": Role.DECODE,
    }


@pytest.mark.parametrize("address", ["a", "a:0", "a:65536", ":1", "a b:1", "http://a:1"])
def test_wrong_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:9001"):
        load_router("--prefill", address)


def test_worker_in_both_pools_is_refused() -> None:
    with pytest.raises(ConfigError, match="a:1"):
        static_members(["a:1"], ["a:1"])


def test_no_worker_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="prefill"):
        static_members([], [])
