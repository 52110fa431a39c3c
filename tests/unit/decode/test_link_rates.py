"""What READs say about a link, and what is said about it to operators and routers."""

import logging

import pytest
from prometheus_client import CollectorRegistry

from decode.link_rates import RATE_BYTES, LinkRates
from decode.metrics import ImportMetrics

BLOCK = 1 << 18
FULL = RATE_BYTES // BLOCK


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def rates(registry: CollectorRegistry) -> LinkRates:
    rates = LinkRates(BLOCK, ImportMetrics(registry, "tcp"))
    rates.opened("a/1", "a")
    return rates


def gauge(registry: CollectorRegistry, name: str, peer: str = "a") -> float | None:
    return registry.get_sample_value(f"diptych_kv_link_{name}", {"peer": peer, "transport": "tcp"})


def reported(rates: LinkRates) -> dict[str, float]:
    return {link.prefill_worker_id: link.bytes_per_s for link in rates.report()}


def test_larger_reads_replace_smaller_ones_until_they_show_the_rate(
    rates: LinkRates, registry: CollectorRegistry
) -> None:
    rates.read("a/1", 1, 0.5)
    assert reported(rates) == {"a": 2 * BLOCK}
    rates.read("a/1", 1, 0.25)
    rates.read("a/1", FULL, 1.0)
    assert reported(rates) == {"a": RATE_BYTES}
    rates.read("a/1", 1, 10.0)  # a small READ says nothing about the rate any more
    assert gauge(registry, "bytes_per_second") == RATE_BYTES
    assert gauge(registry, "latency_seconds") == 0.25


def test_a_change_of_rate_is_followed(rates: LinkRates) -> None:
    rates.read("a/1", FULL, 1.0)
    for _ in range(30):
        rates.read("a/1", 2 * FULL, 8.0)
    assert reported(rates)["a"] == pytest.approx(RATE_BYTES / 4, rel=0.01)


def test_series_end_with_the_last_link_and_routers_go_on_knowing_the_rate(
    rates: LinkRates, registry: CollectorRegistry
) -> None:
    rates.read("a/1", FULL, 1.0)
    rates.opened("a/2", "a")
    rates.closed("a/1")
    assert gauge(registry, "bytes_per_second") == RATE_BYTES
    rates.closed("a/2")
    rates.closed("a/2")
    assert gauge(registry, "bytes_per_second") is None
    assert reported(rates) == {"a": RATE_BYTES}
    rates.opened("a/3", "a")
    rates.read("a/3", 1, 1.0)  # over the new link, however small
    assert reported(rates) == {"a": BLOCK}


def test_a_link_much_slower_than_the_others_is_warned_of_once(
    rates: LinkRates, caplog: pytest.LogCaptureFixture
) -> None:
    # Met elsewhere: RDMA fell back to TCP, and nobody noticed.
    for peer in ("b", "c"):
        rates.opened(f"{peer}/1", peer)
        rates.read(f"{peer}/1", FULL, 0.1)
    with caplog.at_level(logging.WARNING):
        rates.read("a/1", FULL, 0.3)
        assert not caplog.messages
        for _ in range(20):
            rates.read("a/1", FULL, 1.0)
    (warning,) = caplog.messages
    assert "prefill worker a" in warning and "tcp" in warning


def test_a_pair_that_could_use_nixl_is_told_so_once(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = ImportMetrics(registry, "tcp")
    for both in ((False, True), (True, False), (True, True)):
        rates = LinkRates(BLOCK, metrics, could_use_nixl=both[0])
        for link in range(2):
            rates.opened(f"a/{link}", "a")
            rates.met("a", both[1])
        assert len(caplog.messages) == (both == (True, True))
    assert "prefill worker a by tcp" in caplog.messages[0]


def test_workers_long_gone_are_forgotten(rates: LinkRates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decode.link_rates.MAX_WORKERS", 3)
    for i in range(9):
        rates.opened(f"w{i}/1", f"w{i}")
        rates.read(f"w{i}/1", 1, 1.0)
        rates.closed(f"w{i}/1")
    assert list(reported(rates)) == ["w7", "w8"]  # and the one whose link is up
