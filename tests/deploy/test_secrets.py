"""Secrets that the chart makes are what the processes take."""

import base64
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from core.errors import UnavailableError
from decode.settings import DecodeSettings
from router.access.keys import read_keys
from rpc.auth import Credentials
from tests.support.fake_sequence import expected
from tests.support.fake_worker import FakeWorker
from tests.support.helm import Manifest, render, settings_of
from tests.support.router_fleet import make_request, router_on, run
from worker.process import credentials_of


def secret(name: str, values: Manifest) -> Manifest:
    """Contents of a Secret, decoded."""
    found = render(values).one("Secret", name)
    data = {key: base64.b64decode(value).decode() for key, value in found.get("data", {}).items()}
    return data | found.get("stringData", {})


def test_token_is_long_and_fresh() -> None:
    tokens = {secret("-grpc-token", {})["token"] for _ in range(2)}
    assert len(tokens) == 2
    assert {len(token) for token in tokens} == {48}
    for token in tokens:
        assert Credentials(token=token).metadata
    assert secret("-grpc-token", {"grpc": {"auth": {"token": "mine"}}})["token"] == "mine"


def test_nothing_is_made_where_something_exists() -> None:
    values: Manifest = {
        "grpc": {
            "auth": {"existingSecret": "a", "secretKey": "b"},
            "tls": {"enabled": True, "existingSecret": "c"},
        },
        "router": {
            "apiKeys": {"enabled": True, "existingSecret": "d"},
            "tls": {"enabled": True, "existingSecret": "e"},
        },
    }
    rendering = render(values)
    assert not rendering.of("Secret")
    text = yaml.safe_dump(rendering.one("Deployment", "-router"))
    assert "name: a\n" in text
    assert "key: b\n" in text
    for name in "cde":
        assert f"secretName: {name}\n" in text


async def test_generated_certificate_joins_routers_and_workers(tmp_path: Path) -> None:
    """One certificate for all: they are reached at addresses that it does not bear."""
    rendering = render({"grpc": {"tls": {"enabled": True}}})
    for name, content in rendering.one("Secret", "-grpc-tls")["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    router, worker = (
        {key: str(value).replace("/etc/diptych/tls", str(tmp_path)) for key, value in each.items()}
        for each in (settings_of(rendering, "router"), settings_of(rendering, "decode"))
    )
    tls = {key: router[key] for key in ("tls_ca", "tls_cert", "tls_key", "tls_server_name")}
    assert tls.items() <= worker.items()
    decode = FakeWorker(role="decode", worker_id="d")
    decode.credentials = credentials_of(DecodeSettings.model_validate(tls))
    assert decode.credentials.server_name == "workers.demo-diptych"
    await decode.start()
    try:
        async with router_on([decode], **tls) as dispatcher:
            assert await run(dispatcher, make_request([5, 6], 4)) == expected([5, 6], 4)
        registry = CollectorRegistry()
        other = tls | {"tls_server_name": "127.0.0.1"}
        async with router_on([decode], registry=registry, attach=False, **other) as dispatcher:
            with pytest.raises(UnavailableError):
                await run(dispatcher, make_request([5, 6], 4, timeout_s=1.0))
    finally:
        await decode.stop()


def test_generated_api_key_opens_the_door() -> None:
    more = {"name": "team", "hash": "sha256:" + "0" * 64, "requests_per_minute": 60}
    values = {"router": {"apiKeys": {"enabled": True, "entries": [more]}}}
    found = secret("-api-keys", values)
    read = read_keys(found["keys.yaml"], "keys.yaml")
    entry = read.find(found["key"].encode())
    assert entry is not None
    assert (entry.name, entry.admin) == ("default", True)
    assert [each.name for each in read.entries] == ["default", "team"]
    assert found["key"] not in found["keys.yaml"]


def test_routers_are_not_given_the_plain_key() -> None:
    deployment = render({"router": {"apiKeys": {"enabled": True}}}).one("Deployment", "-router")
    volumes = {each["name"]: each for each in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["api-keys"]["secret"]["items"] == [{"key": "keys.yaml", "path": "keys.yaml"}]
