"""A worker that can't listen where it was told to says so in one line, and starts nothing."""

import socket
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from core.errors import ConfigError
from prefill.service import PrefillExtension
from prefill.settings import PrefillSettings
from worker.exit_status import EXIT_REFUSED
from worker.process import RoleProcesses, run_worker
from worker.process_metrics import open_metrics_port

ROLE = RoleProcesses(
    name="prefill", engine_module="no.such.module", build_extension=PrefillExtension
)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "Choose another host or port"),
        ({"host": "0.0.0.0"}, "Set auth_token, or tls_cert"),
        ({"tls_cert": "/no/cert", "tls_key": "/no/key", "tls_ca": "/no/ca"}, "/no/c"),
    ],
)
def test_what_can_not_be_served_ends_with_advice(
    settings: dict[str, object],
    advice: str,
    taken_port: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = PrefillSettings.model_validate({"port": taken_port, **settings})
    assert run_worker(given, ROLE) == EXIT_REFUSED
    (record,) = caplog.records
    assert record.message.startswith("can't start: ")
    assert advice in record.message
    assert record.exc_info is None


async def test_metrics_port_that_is_taken_is_named(taken_port: int) -> None:
    settings = PrefillSettings(metrics_port=taken_port)
    with pytest.raises(ConfigError, match=rf"{taken_port}.*Choose another metrics_port"):
        await open_metrics_port(CollectorRegistry(), settings, labels={}, ready=lambda: True)
