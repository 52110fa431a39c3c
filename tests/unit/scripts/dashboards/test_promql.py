import pytest

from scripts.dashboards.family import UnknownLabelError, UnknownMetricError
from scripts.dashboards.promql import Source
from scripts.dashboards.registry import build_catalogue

SOURCE = Source(build_catalogue(), "5m")
REQUESTS = "diptych_router_requests_total"
TTFT = "diptych_router_time_to_first_token_seconds"


def test_text_is_promql() -> None:
    errors = SOURCE.rate(REQUESTS, outcome="internal").sum("api")
    assert errors.text == f'sum by (api) (rate({REQUESTS}{{outcome="internal"}}[5m]))'
    others = SOURCE.over("1h").rate(REQUESTS, outcome="!~ok|disconnected")
    assert others.text == f'rate({REQUESTS}{{outcome!~"ok|disconnected"}}[1h])'
    p99 = SOURCE.quantile(0.99, TTFT, "api")
    assert p99.text == (f"histogram_quantile(0.99, sum by (le, api) (rate({TTFT}_bucket[5m])))")
    ratio = errors / (SOURCE.rate(REQUESTS).sum("api") > 0)
    assert ratio.text == f"({errors.text} / (sum by (api) (rate({REQUESTS}[5m])) > 0))"
    assert ratio.families == {REQUESTS}


def test_a_selector_adds_to_every_metric() -> None:
    source = Source(SOURCE.catalogue, "5m", lambda family: {"namespace": "=~$namespace"})
    assert source.now("diptych_worker_ready", role="decode").text == (
        'diptych_worker_ready{namespace=~"$namespace",role="decode"}'
    )


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda: SOURCE.rate("diptych_router_request_total"), UnknownMetricError, "declares"),
        (lambda: SOURCE.rate(REQUESTS, status="200"), UnknownLabelError, "no label 'status'"),
        (lambda: SOURCE.rate(REQUESTS, outcome="fine"), UnknownLabelError, "outcome='fine'"),
        (lambda: SOURCE.rate(REQUESTS, outcome="!=fine"), UnknownLabelError, "outcome='fine'"),
        (lambda: SOURCE.rate(REQUESTS).sum("worker"), UnknownLabelError, "'worker'"),
        (lambda: SOURCE.rate(REQUESTS).sum("api").max("outcome"), UnknownLabelError, "has"),
        (lambda: SOURCE.now(REQUESTS), TypeError, "is a counter"),
        (lambda: SOURCE.rate(TTFT), TypeError, "is a histogram"),
        (
            lambda: SOURCE.rate(REQUESTS).joined(SOURCE.now("diptych_build_info"), "pool"),
            UnknownLabelError,
            "'pool'",
        ),
    ],
)
def test_what_does_not_exist_fails_at_once(build, error, told) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=told):
        build()


def test_a_metric_of_two_processes_bears_the_labels_of_both() -> None:
    build = SOURCE.catalogue["diptych_build_info"]
    assert set(build.processes) == {"router", "worker"}
    assert not build.of_workers
    assert {"prefill", "decode"} == set(SOURCE.catalogue["diptych_kv_blocks"].processes)
