"""Ports between processes: a token, or TLS both ways; nothing without."""

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest
import trustme

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import kv_export_pb2, kv_export_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.support.cluster import cluster
from tests.support.process import wait_until


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


@pytest.mark.parametrize("token", [None, "wrong"])
def test_every_call_without_the_token_is_refused(tiny_llama: Path, token: str | None) -> None:
    with cluster(tiny_llama, prefill=1, decode=0) as system:

        async def call() -> list[grpc.StatusCode]:
            codes = []
            async with open_channel(system.prefill[0].address, Credentials(token=token)) as channel:
                worker = worker_pb2_grpc.WorkerStub(channel)
                export = kv_export_pb2_grpc.KvExportStub(channel)
                for attempt in (
                    lambda: worker.Describe(worker_pb2.DescribeRequest(), timeout=5),
                    lambda: worker.FlushCache(worker_pb2.FlushCacheRequest(), timeout=5),
                    lambda: worker.Attach(iter([worker_pb2.RouterMessage()]), timeout=5).read(),
                    lambda: export.Link(iter([kv_export_pb2.DecodeMessage()]), timeout=5).read(),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await attempt()
                    codes.append(refused.value.code())
            return codes

        assert set(asyncio.run(call())) == {grpc.StatusCode.UNAUTHENTICATED}


def test_mutual_tls_on_every_link(tiny_llama: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    ca, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(ca)
    leaf.private_key_pem.write_to_path(key)
    leaf.cert_chain_pems[0].write_to_path(cert)
    tls = {"tls_ca": ca, "tls_cert": cert, "tls_key": key}
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

        async def in_clear() -> None:
            address = system.decode[0].address
            async with open_channel(address, Credentials(token="test-token")) as channel:
                stub = worker_pb2_grpc.WorkerStub(channel)
                await stub.Describe(worker_pb2.DescribeRequest(), timeout=3)

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            asyncio.run(in_clear())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
