import pytest

from router.api.identity import identify

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"00-{TRACE}-{SPAN}-01", TRACE),
        (f"01-{TRACE}-{SPAN}-00-more", TRACE),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_trace_id_is_read_from_a_valid_traceparent(header: str, expected: str | None) -> None:
    assert identify({b"traceparent": header.encode()}).trace_id == expected


def test_request_id_is_the_clients_if_it_is_fit() -> None:
    found = identify({b"x-request-id": b"abc-1"})
    assert (found.request_id, found.client_gave_id) == ("abc-1", True)
    for unfit in (b"", b"x" * 129, b"a\tb"):
        found = identify({b"x-request-id": unfit})
        assert found.request_id not in ("", unfit.decode()) and not found.client_gave_id
