"""A system with keys: tenants share no cached blocks, and no secret is seen anywhere."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from rpc.auth import Credentials
from rpc.channel import open_channel
from rpc.v1 import worker_pb2, worker_pb2_grpc
from tests.support.api_keys import KeyRing
from tests.support.cluster import TOKEN, Cluster, cluster
from tests.support.collector import Collector, collecting
from tests.support.process import descendants, wait_until

RING = KeyRing(alice={}, bob={"tenant": "team"}, carol={"tenant": "team"}, root={"admin": True})
CACHE_SECRET = "cache-secret-7c1f"
WRONG = {"key": "dk-wrong-55aa", "token": "wrong-token-66bb"}
PROMPT = "quartz-zebra " * 12


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as server:
        yield server


@pytest.fixture(scope="module")
def system(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Cluster]:
    keys = RING.write(tmp_path_factory.mktemp("keys") / "keys.yaml")
    with cluster(
        tiny_llama,
        worker={"log_level": "debug"},
        router={"api_keys": keys, "log_level": "debug", "trace_endpoint": collector.url},
        router_env={"DIPTYCH_ROUTER_CACHE_SECRET": CACHE_SECRET},
        headers=RING.bearer("root"),
    ) as running:
        yield running


def complete(system: Cluster, name: str, **fields: object) -> httpx.Response:
    return httpx.post(
        f"{system.url}/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields},
        headers=RING.bearer(name),
        timeout=60,
    )


def test_tenants_share_no_cached_blocks_and_keys_of_one_tenant_do(system: Cluster) -> None:
    def cached(name: str, **fields: object) -> int:
        answer = complete(system, name, **fields)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["text"])
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    texts: set[str] = set()
    assert cached("alice") == 0
    assert cached("alice") > 0
    assert cached("bob") == 0
    assert cached("carol") > 0
    assert cached("carol", cache_salt="apart") == 0
    assert cached("bob", cache_salt="apart") > 0
    assert cached("alice", cache_salt="apart") == 0
    assert len(texts) == 1  # what is apart is the cache, not the answer
    system.wait_balanced()


async def _call_with_a_wrong_token(address: str) -> None:
    async with open_channel(address, Credentials(token=WRONG["token"])) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Describe(worker_pb2.DescribeRequest(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    _forbid(f"{refused.value.details()}", "an error of gRPC")


SECRETS = {
    "the token": TOKEN,
    "the cache secret": CACHE_SECRET,
    **{f"{name}'s key": key for name, key in RING.plain.items()},
    **{f"a wrong {kind}": value for kind, value in WRONG.items()},
    "a prompt": "quartz-zebra",
}


def _forbid(text: str, where: str) -> None:
    for name, secret in SECRETS.items():
        assert secret not in text, f"{name} in {where}"


def test_no_secret_and_no_prompt_is_seen_anywhere(system: Cluster, collector: Collector) -> None:
    root = RING.bearer("root")
    answer = complete(system, "alice", stream=True)
    request_id = answer.headers["x-request-id"]
    assert answer.status_code == 200
    errors = [
        httpx.get(f"{system.url}/v1/models", headers={"authorization": f"Bearer {WRONG['key']}"}),
        httpx.get(f"{system.url}/v1/models", headers={"x-api-key": WRONG["key"]}),
        httpx.get(f"{system.url}/v1/models", auth=("root", WRONG["key"])),
        httpx.get(f"{system.url}/metrics", headers=RING.bearer("alice")),
        complete(system, "bob", max_tokens=-1),
        complete(system, "bob", nonsense=1),
    ]
    assert [error.status_code for error in errors] == [401, 401, 401, 403, 400, 400]
    for worker in system.workers:
        asyncio.run(_call_with_a_wrong_token(worker.address))

    for error in errors:
        _forbid(error.text + repr(error.headers), str(error.url))
    for path in (
        "/metrics",
        "/v1/fleet",
        "/v1/requests",
        "/get_server_info",
        "/openapi.json",
        f"/v1/requests/{request_id}/timeline",
        f"/v1/requests/{request_id}/explain",
    ):
        shown = system.get(path)
        assert shown.status_code == 200, path
        _forbid(shown.text, path)
    for worker in system.workers:
        for path in ("metrics", "healthz", "nothing"):
            url = f"http://127.0.0.1:{worker.metrics_port}/{path}"
            _forbid(httpx.get(url, headers=root).text, url)

    pids = [system.router.pid, *descendants(system.router.pid)]
    pids += [pid for worker in system.workers for pid in worker.pids]
    for pid in pids:
        for name in ("cmdline", "comm"):
            _forbid((Path("/proc") / str(pid) / name).read_text(), f"{name} of a process")
    assert len(pids) >= 5
    wait_until(lambda: not collector.got.empty(), 15, "traces to be sent", lambda: "")
    while not collector.got.empty():
        _forbid(collector.got.get()[1].decode("latin-1"), "a trace")
    assert "listening on" in system.log
    _forbid(system.log, "the log")


@pytest.mark.parametrize("role", ["router", "prefill", "decode"])
def test_what_a_command_prints_of_its_settings_and_their_mistakes(
    role: str, tmp_path: Path
) -> None:
    keys = RING.write(tmp_path / "keys.yaml")
    prefix = f"DIPTYCH_{role.upper()}_"
    own = {f"{prefix}API_KEYS": str(keys), f"{prefix}CACHE_SECRET": CACHE_SECRET}

    def run(token: str, *argv: str) -> str:
        env = {**os.environ, f"{prefix}AUTH_TOKEN": token, **(own if role == "router" else {})}
        command = [sys.executable, "-m", "diptych", role, *argv]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
        printed: str = done.stdout + done.stderr
        _forbid(printed, f"what {' '.join(argv)} prints")
        return printed

    assert "auth_token" in run(TOKEN, "--print-config")
    assert "port" in run(TOKEN, "--port=-1")
