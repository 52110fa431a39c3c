from router.api.identity import identify
from telemetry.trace_context import TraceContext

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


def test_the_clients_trace_is_taken_over() -> None:
    found = identify({b"traceparent": f"00-{TRACE}-{SPAN}-01".encode()}).trace
    assert found == TraceContext(TRACE, SPAN, sampled=True)
    assert identify({}).trace is None


def test_request_id_is_the_clients_if_it_is_fit() -> None:
    found = identify({b"x-request-id": b"abc-1"})
    assert (found.request_id, found.client_gave_id) == ("abc-1", True)
    for unfit in (b"", b"x" * 129, b"a\tb"):
        found = identify({b"x-request-id": unfit})
        assert found.request_id not in ("", unfit.decode()) and not found.client_gave_id
