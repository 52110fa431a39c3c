"""Real gRPC on loopback: who is let in, what is always there, what is refused."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from core.errors import ConfigError
from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.server import RpcServer, build_server
from rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.support.pki import Files, issue

SERVICE = "diptych.v1.Worker"
TIMEOUT_S = 5.0


class EchoWorker(worker_pb2_grpc.WorkerServicer):
    """Answers Describe, and every message of Attach with a hello."""

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        return worker_pb2.DescribeResponse(worker=worker_pb2.WorkerDescription(model="m"))

    async def Attach(self, request_iterator, context):  # type: ignore[no-untyped-def]
        async for _ in request_iterator:
            yield worker_pb2.WorkerMessage(hello=worker_pb2.WorkerDescription(model="m"))


@asynccontextmanager
async def served(credentials: Credentials) -> AsyncIterator[tuple[RpcServer, str]]:
    server = build_server(credentials, services=[SERVICE])
    worker_pb2_grpc.add_WorkerServicer_to_server(EchoWorker(), server.grpc_server)
    port = server.bind("127.0.0.1", 0)
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def describe(address: str, credentials: Credentials) -> str:
    async with open_channel(address, credentials) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        reply = await stub.Describe(worker_pb2.DescribeRequest(), timeout=TIMEOUT_S)
        return str(reply.worker.model)


async def attach(address: str, credentials: Credentials) -> str:
    async with open_channel(address, credentials) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Attach(timeout=TIMEOUT_S)
        await call.write(worker_pb2.RouterMessage())
        message = await call.read()
        assert message is not grpc.aio.EOF
        return str(message.hello.model)


async def refusal(address: str, credentials: Credentials, *, stream: bool) -> grpc.StatusCode:
    ask = attach if stream else describe
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(address, credentials)
    return caught.value.code()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a CA, of a certificate for loopback, and of a stranger's certificate."""
    folder = tmp_path_factory.mktemp("pki")
    authority, stranger = trustme.CA(), trustme.CA()
    issued = {
        "ours": authority.issue_cert("127.0.0.1", "workers.diptych"),
        "theirs": stranger.issue_cert("127.0.0.1"),
    }
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name, pair in issued.items():
        pair.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
        pair.private_key_pem.write_to_path(str(folder / f"{name}.key"))
    return {path.name: path for path in folder.iterdir()}


def ours(pki: dict[str, Path], *, ca: bool = True, **more: object) -> Credentials:
    return Credentials(
        ca=pki["ca.pem"] if ca else None,
        cert=pki["ours.pem"],
        key=pki["ours.key"],
        **more,  # type: ignore[arg-type]
    )


def _of(files: Files) -> Credentials:
    return Credentials(ca=files.ca, cert=files.cert, key=files.key)


async def test_right_token_is_let_in() -> None:
    credentials = Credentials(token="right")
    async with served(credentials) as (_, address):
        assert await describe(address, credentials) == "m"
        assert await attach(address, credentials) == "m"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("token", [None, "wrong", "right-", "-right"])
async def test_wrong_token_is_unauthenticated(token: str | None, stream: bool) -> None:
    async with served(Credentials(token="right")) as (_, address):
        code = await refusal(address, Credentials(token=token), stream=stream)
    assert code is grpc.StatusCode.UNAUTHENTICATED


async def test_stream_that_sends_nothing_is_refused_at_once() -> None:
    async with (
        served(Credentials(token="right")) as (_, address),
        open_channel(address, Credentials()) as channel,
    ):
        call = worker_pb2_grpc.WorkerStub(channel).Attach(timeout=TIMEOUT_S)
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_callers_own_metadata_travels_beside_the_token() -> None:
    credentials = Credentials(token="right")
    async with (
        served(credentials) as (_, address),
        open_channel(address, credentials) as channel,
    ):
        reply = await worker_pb2_grpc.WorkerStub(channel).Describe(
            worker_pb2.DescribeRequest(), timeout=TIMEOUT_S, metadata=(("x-request-id", "1"),)
        )
    assert reply.worker.model == "m"


async def test_health_needs_no_token_and_tells_the_truth() -> None:
    async with (
        served(Credentials(token="right")) as (server, address),
        open_channel(address, Credentials()) as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request, timeout=TIMEOUT_S)).status == status.NOT_SERVING
            await server.set_serving(True)
            assert (await stub.Check(request, timeout=TIMEOUT_S)).status == status.SERVING
            await server.set_serving(False)


async def test_reflection_lists_the_services_to_those_with_the_token() -> None:
    credentials = Credentials(token="right")

    async def services(credentials: Credentials) -> set[str]:
        async with open_channel(address, credentials) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            request = reflection_pb2.ServerReflectionRequest(list_services="")
            found: set[str] = set()
            async for reply in stub.ServerReflectionInfo(iter([request]), timeout=TIMEOUT_S):
                found |= {s.name for s in reply.list_services_response.service}
            return found

    async with served(credentials) as (_, address):
        assert {SERVICE, "grpc.health.v1.Health"} <= await services(credentials)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await services(Credentials())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_tls_server_needs_no_client_certificate_unless_mutual(pki: dict[str, Path]) -> None:
    async with served(ours(pki, ca=False, token="right")) as (_, address):
        client = Credentials(ca=pki["ca.pem"], token="right")
        assert await describe(address, client) == "m"
        assert await attach(address, client) == "m"
        no_token = await refusal(address, Credentials(ca=pki["ca.pem"]), stream=False)
        assert no_token is grpc.StatusCode.UNAUTHENTICATED
        plain = await refusal(address, Credentials(token="right"), stream=False)
        assert plain is grpc.StatusCode.UNAVAILABLE


async def test_mutual_tls_lets_in_only_certificates_of_the_ca(pki: dict[str, Path]) -> None:
    async with served(ours(pki)) as (_, address):
        assert await describe(address, ours(pki)) == "m"
        anonymous = Credentials(ca=pki["ca.pem"])
        assert await refusal(address, anonymous, stream=False) is grpc.StatusCode.UNAVAILABLE
        stranger = Credentials(ca=pki["ca.pem"], cert=pki["theirs.pem"], key=pki["theirs.key"])
        assert await refusal(address, stranger, stream=False) is grpc.StatusCode.UNAVAILABLE


async def test_server_that_is_not_of_the_ca_is_not_talked_to(pki: dict[str, Path]) -> None:
    impostor = Credentials(cert=pki["theirs.pem"], key=pki["theirs.key"])
    async with served(impostor) as (_, address):
        client = Credentials(ca=pki["ca.pem"])
        assert await refusal(address, client, stream=False) is grpc.StatusCode.UNAVAILABLE


async def test_certificate_may_bear_another_name_if_told(pki: dict[str, Path]) -> None:
    async with served(ours(pki, ca=False)) as (_, address):
        named = Credentials(ca=pki["ca.pem"], server_name="workers.diptych")
        assert await describe(address, named) == "m"
        wrong = Credentials(ca=pki["ca.pem"], server_name="other")
        assert await refusal(address, wrong, stream=False) is grpc.StatusCode.UNAVAILABLE


async def test_renewed_files_serve_whoever_connects_from_then_on(tmp_path: Path) -> None:
    # As Kubernetes mounts a Secret: the files are behind a link, which is swapped.
    old, new = issue(tmp_path / "old"), issue(tmp_path / "new")
    mounted = tmp_path / "mounted"
    mounted.symlink_to("old")
    shared = _of(Files(mounted / "ca.crt", mounted / "tls.crt", mounted / "tls.key"))
    async with served(shared) as (_, address), open_channel(address, shared) as before:
        stream = worker_pb2_grpc.WorkerStub(before).Attach(timeout=4 * TIMEOUT_S)
        await stream.write(worker_pb2.RouterMessage())
        await stream.read()
        assert await refusal(address, _of(new), stream=False) is grpc.StatusCode.UNAVAILABLE

        (tmp_path / "next").symlink_to("new")
        (tmp_path / "next").rename(mounted)
        assert await describe(address, shared) == "m"
        assert await describe(address, _of(new)) == "m"
        assert await refusal(address, _of(old), stream=False) is grpc.StatusCode.UNAVAILABLE
        await stream.write(worker_pb2.RouterMessage())
        assert await stream.read() is not grpc.aio.EOF


async def test_half_renewed_files_change_nothing_until_they_fit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = trustme.CA()
    used, client = issue(tmp_path / "used", authority), issue(tmp_path / "client", authority)
    new = issue(tmp_path / "new")
    async with served(_of(used)) as (_, address):
        new.key.replace(used.key)
        assert await describe(address, _of(client)) == "m"
        assert "tls.key can't be used" in caplog.text
        new.cert.replace(used.cert)
        new.ca.replace(used.ca)
        assert await refusal(address, _of(client), stream=False) is grpc.StatusCode.UNAVAILABLE
        assert await describe(address, _of(used)) == "m"


async def test_port_is_never_shared() -> None:
    async with served(Credentials()) as (_, address):
        host, _, port = address.partition(":")
        with pytest.raises(ConfigError, match=port):
            build_server(Credentials(), services=[]).bind(host, int(port))


async def test_open_host_without_protection_is_refused_unless_insecure(
    pki: dict[str, Path],
) -> None:
    with pytest.raises(ConfigError, match="auth_token"):
        build_server(Credentials(), services=[]).bind("0.0.0.0", 0)
    with pytest.raises(ConfigError, match="insecure"):
        build_server(ours(pki, ca=False), services=[]).bind("0.0.0.0", 0)


async def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, proxy)
        monkeypatch.delenv("no_proxy", raising=False)
        async with served(Credentials()) as (_, address):
            assert await describe(address, Credentials()) == "m"
