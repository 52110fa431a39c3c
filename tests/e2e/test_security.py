"""Ports between processes: a token, or TLS both ways; nothing without, and no harm with."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpc.auth import Credentials
from rpc.channel import MAX_MESSAGE_BYTES, open_channel
from rpc.v1 import kv_export_pb2, worker_pb2
from tests.support.cluster import TOKEN, Cluster, cluster
from tests.support.pki import issue
from tests.support.process import wait_until
from tests.support.protobuf import messages


def test_a_router_with_the_wrong_token_gets_no_worker_and_says_why(tiny_llama: Path) -> None:
    router = {"auth_token": "wrong"}
    with cluster(tiny_llama, prefill=0, decode=1, router=router, wait=False) as system:

        def refused() -> bool:
            try:
                ready = system.get("/ready")
            except httpx.TransportError:
                return False
            return ready.status_code == 503 and "token" in ready.text

        wait_until(refused, 60, "the router to be refused", lambda: system.log)


@pytest.fixture(scope="module")
def system(tiny_llama: Path) -> Iterator[Cluster]:
    with cluster(tiny_llama) as running:
        yield running


def _same(data: bytes) -> bytes:
    return data


async def _methods(address: str) -> dict[str, bool]:
    """Every method of every service on a port, by reflection; True: it takes a stream."""
    async with open_channel(address, Credentials(token=TOKEN)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        async def ask(**request: str) -> reflection_pb2.ServerReflectionResponse:
            message = reflection_pb2.ServerReflectionRequest(**request)
            async for reply in stub.ServerReflectionInfo(iter([message]), timeout=5):
                return reply
            raise AssertionError("no reply")

        found = {}
        for service in (await ask(list_services="")).list_services_response.service:
            files = await ask(file_containing_symbol=service.name)
            for data in files.file_descriptor_response.file_descriptor_proto:
                file = descriptor_pb2.FileDescriptorProto.FromString(data)
                for each in file.service:
                    for method in each.method:
                        name = f"/{file.package}.{each.name}/{method.name}"
                        found[name] = method.client_streaming
        return found


async def _call(address: str, method: str, credentials: Credentials) -> grpc.StatusCode:
    """Status of a call that sends nothing, as a stream, which every kind of method takes."""
    async with open_channel(address, credentials) as channel:
        make = channel.stream_stream(method, request_serializer=_same, response_deserializer=_same)
        return await make(timeout=3).code()


@pytest.mark.parametrize("token", [None, "wrong"])
def test_every_method_of_every_port_is_refused_without_the_token(
    system: Cluster, token: str | None
) -> None:
    async def check() -> None:
        for worker in system.workers:
            methods = await _methods(worker.address)
            names = {name.split("/")[1] for name in methods}
            assert {"diptych.v1.Worker", "grpc.reflection.v1alpha.ServerReflection"} <= names
            assert ("diptych.v1.KvExport" in names) == (worker.role == "prefill")
            assert len(methods) >= 6
            for method in [*methods, "/no.such/Method", "/grpc.channelz.v1.Channelz/GetServers"]:
                if method.startswith("/grpc.health.v1.Health/"):
                    continue  # probes carry no token
                code = await _call(worker.address, method, Credentials(token=token))
                assert code is grpc.StatusCode.UNAUTHENTICATED, method

    asyncio.run(check())


def test_messages_above_the_limit_are_refused(system: Cluster) -> None:
    async def code(address: str) -> grpc.StatusCode:
        metadata = Credentials(token=TOKEN).metadata
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            make = channel.stream_stream(
                "/diptych.v1.Worker/Attach",
                request_serializer=_same,
                response_deserializer=_same,
            )
            call = make(metadata=metadata, timeout=20)
            await call.write(b"\0" * (MAX_MESSAGE_BYTES + 1))
            return await call.code()

    for worker in system.workers:
        assert asyncio.run(code(worker.address)) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_no_bytes_crash_a_worker_or_cost_it_a_block(system: Cluster) -> None:
    """Whoever has the token may still be out of its mind."""

    def ask() -> str:
        with system.openai() as client:
            model = client.models.list().data[0].id
            answer = client.completions.create(
                model=model, prompt="The sea", max_tokens=6, temperature=0
            )
        return answer.choices[0].text

    before, pids = ask(), [worker.pids for worker in system.workers]
    streams = [(worker.address, "/diptych.v1.Worker/Attach") for worker in system.workers]
    streams += [(w.address, "/diptych.v1.KvExport/Link") for w in system.prefill]

    async def send(address: str, method: str, frames: list[bytes]) -> None:
        async with open_channel(address, Credentials(token=TOKEN)) as channel:
            make = channel.stream_stream(
                method, request_serializer=_same, response_deserializer=_same
            )
            call = make(timeout=0.3)
            try:
                for frame in frames:
                    await call.write(frame)
                await call.done_writing()
            except (grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):
                pass  # it was refused before the end
            await call.code()

    routers = messages(worker_pb2.RouterMessage).map(lambda m: m.SerializeToString())
    decodes = messages(kv_export_pb2.DecodeMessage).map(lambda m: m.SerializeToString())

    @given(
        st.sampled_from(streams), st.lists(st.binary(max_size=99) | routers | decodes, max_size=4)
    )
    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def storm(stream: tuple[str, str], frames: list[bytes]) -> None:
        asyncio.run(send(*stream, frames))

    storm()
    system.wait_balanced()
    assert [worker.pids for worker in system.workers] == pids
    assert ask() == before


def test_mutual_tls_on_every_link(tiny_llama: Path, tmp_path: Path) -> None:
    files = issue(tmp_path / "ours")
    strangers = issue(tmp_path / "theirs")
    tls = {"tls_ca": files.ca, "tls_cert": files.cert, "tls_key": files.key}
    with cluster(tiny_llama, worker=tls, router=tls, wait=False) as system:
        wait_until(
            lambda: system.num_attached("prefill") and system.num_attached("decode"),
            60,
            "both workers to be attached",
            lambda: system.log,
        )
        with system.openai() as client:
            model = client.models.list().data[0].id
            answer = client.completions.with_raw_response.create(
                model=model, prompt="The sea", max_tokens=6
            )
        assert answer.headers["x-diptych-mode"] == "disaggregated"

        token = {"token": TOKEN}
        for credentials in (
            Credentials(**token),
            Credentials(ca=files.ca, **token),
            Credentials(ca=files.ca, cert=strangers.cert, key=strangers.key, **token),
        ):
            code = asyncio.run(
                _call(system.decode[0].address, "/diptych.v1.Worker/Attach", credentials)
            )
            assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
