"""Which transport a worker gets."""

import logging

import pytest

from core.errors import ConfigError, TransferError
from kvtransfer import nixl, nixl_agent, select
from kvtransfer.nixl_agent import ucx_environment
from tests.support.kv import HostPool


class DevicePool(HostPool):
    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        super().__init__(num_blocks, block_bytes)
        self.device_id = 0


def no_nixl() -> None:
    raise TransferError("not installed")


def test_auto_falls_back_to_tcp_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nixl, "load_nixl", no_nixl)
    with caplog.at_level(logging.WARNING):
        transport = select.open_transport("auto", HostPool(2, 4096), host="localhost", token="t")
    assert transport.name == "tcp"
    assert "not installed" in caplog.text
    transport.close()


def test_auto_takes_nixl_only_where_it_copies_one_sidedly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Chosen(Exception):
        pass

    def choose(*_: object, **__: object) -> None:
        raise Chosen

    monkeypatch.setattr(select, "NixlTransport", choose)
    monkeypatch.setattr(select, "has_rdma", lambda: False)
    with pytest.raises(Chosen):
        select.open_transport("auto", HostPool(2, 4096), host="127.0.0.1", token="")
    with pytest.raises(Chosen):
        select.open_transport("auto", DevicePool(2, 4096), host="192.0.2.7", token="")
    with pytest.raises(TransferError, match=r"192\.0\.2\.77"):
        select.open_transport("auto", HostPool(2, 4096), host="192.0.2.77", token="")
    monkeypatch.setattr(select, "has_rdma", lambda: True)
    with pytest.raises(Chosen):
        select.open_transport("auto", HostPool(2, 4096), host="192.0.2.77", token="")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("rdma", [True, False])
def test_nixl_could_be_used_where_it_is_installed_and_has_rdma(
    monkeypatch: pytest.MonkeyPatch, installed: bool, rdma: bool
) -> None:
    monkeypatch.setattr(select, "has_rdma", lambda: rdma)
    monkeypatch.setattr(select, "load_nixl", nixl_agent.load_nixl if installed else no_nixl)
    assert select.could_use_nixl() is (installed and rdma)


def test_nixl_by_name_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "load_nixl", no_nixl)
    with pytest.raises(TransferError, match="not installed"):
        select.open_transport("nixl", HostPool(2, 4096), host="127.0.0.1", token="")


def test_device_memory_does_not_go_by_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "load_nixl", no_nixl)
    for name in ("auto", "tcp"):
        with pytest.raises(TransferError):
            select.open_transport(name, DevicePool(2, 4096), host="127.0.0.1", token="")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "no-such-host.invalid"])
def test_host_that_peers_can_not_reach_is_refused(host: str) -> None:
    # Met elsewhere: A default host name made peers look for a worker at themselves.
    with pytest.raises(TransferError):
        select.open_transport("tcp", HostPool(2, 4096), host=host, token="")


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="pigeon"):
        select.open_transport("pigeon", HostPool(2, 4096), host="::1", token="")  # type: ignore[arg-type]


def test_ucx_environment_leaves_what_is_set() -> None:
    assert ucx_environment({"UCX_NET_DEVICES": "eth0"}, loopback=True) == {
        "NIXL_LOG_LEVEL": "WARN",
        "UCX_LOG_LEVEL": "error",
    }
    assert ucx_environment({}, loopback=True)["UCX_NET_DEVICES"] == "lo"
    assert "UCX_NET_DEVICES" not in ucx_environment({}, loopback=False)
