"""Secrets that the chart makes are what the processes take."""

import base64
import ssl
from pathlib import Path

import grpc
import pytest
import yaml

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.server import build_server
from tests.support.helm import Manifest, render, settings_of


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


async def test_generated_certificate_joins_router_and_worker(tmp_path: Path) -> None:
    """One certificate for all: dialled by an address that it does not bear, by its name."""
    values = {"grpc": {"tls": {"enabled": True}}}
    rendering = render(values)
    found = rendering.one("Secret", "-grpc-tls")["data"]
    for name, content in found.items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    files = {"ca": tmp_path / "ca.crt", "cert": tmp_path / "tls.crt", "key": tmp_path / "tls.key"}
    server = build_server(Credentials(**files), services=[])
    port = server.bind("127.0.0.1", 0)
    await server.start()
    name = settings_of(rendering, "router")["tls_server_name"]
    assert name == settings_of(rendering, "decode")["tls_server_name"]
    ready = {}
    try:
        for asked in (name, None):
            client = Credentials(**files, server_name=asked)
            async with open_channel(f"127.0.0.1:{port}", client) as channel:
                check = channel.unary_unary("/grpc.health.v1.Health/Check")
                try:
                    await check(b"", timeout=3)
                    ready[asked] = True
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE
                    ready[asked] = False
    finally:
        await server.stop(0)
    assert ready == {name: True, None: False}
    assert ssl.create_default_context(cafile=str(files["ca"])).get_ca_certs()


def test_generated_api_key_opens_the_door() -> None:
    keys = pytest.importorskip("router.access.keys")
    more = {"name": "team", "hash": "sha256:" + "0" * 64, "requests_per_minute": 60}
    values = {"router": {"apiKeys": {"enabled": True, "entries": [more]}}}
    found = secret("-api-keys", values)
    read = keys.read_keys(found["keys.yaml"], "keys.yaml")
    entry = read.find(found["key"].encode())
    assert (entry.name, entry.admin) == ("default", True)
    assert [each.name for each in read.entries] == ["default", "team"]
    assert found["key"] not in found["keys.yaml"]


def test_routers_are_not_given_the_plain_key() -> None:
    deployment = render({"router": {"apiKeys": {"enabled": True}}}).one("Deployment", "-router")
    volumes = {each["name"]: each for each in deployment["spec"]["template"]["spec"]["volumes"]}
    assert volumes["api-keys"]["secret"]["items"] == [{"key": "keys.yaml", "path": "keys.yaml"}]
