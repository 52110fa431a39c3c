"""The doctor against real ports: each way in which a peer can't be used is named as what it is."""

import asyncio
import json
import ssl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trustme
from prometheus_client import CollectorRegistry, Gauge

from diptych.chat.client import trusted
from diptych.doctor.finding import Finding, Level
from diptych.doctor.main import look_at_peers, main
from diptych.doctor.peer_checks import check_clock, check_router, check_together
from diptych.doctor.peers import RouterFacts, WorkerFacts, look_at_router
from diptych.doctor.settings import DoctorSettings
from rpc.auth import Credentials
from rpc.server import build_server
from rpc.v1 import worker_pb2, worker_pb2_grpc
from telemetry.metrics import serve_metrics
from tests.support.process import free_port

TOKEN = "right-token"


def description(**changes: Any) -> worker_pb2.WorkerDescription:
    values: dict[str, Any] = {
        "worker_id": "w",
        "role": worker_pb2.ROLE_PREFILL,
        "model": "m",
        "model_digest": b"0123456789abcdef",
        "version": "1.0",
        "transports": ["nixl", "tcp"],
        "layout": worker_pb2.KvLayout(num_layers=2, block_size=16, dtype="bfloat16"),
    }
    return worker_pb2.WorkerDescription(**{**values, **changes})


@dataclass
class Described(worker_pb2_grpc.WorkerServicer):
    """A worker that says who it is."""

    about: worker_pb2.WorkerDescription

    async def Describe(self, request, context):  # type: ignore[no-untyped-def]
        return worker_pb2.DescribeResponse(worker=self.about)


@asynccontextmanager
async def worker(
    credentials: Credentials, *, serving: bool = True, **changes: Any
) -> AsyncIterator[str]:
    server = build_server(credentials, services=["diptych.v1.Worker"])
    worker_pb2_grpc.add_WorkerServicer_to_server(
        Described(description(**changes)), server.grpc_server
    )
    port = server.bind("127.0.0.1", 0)
    await server.start()
    await server.set_serving(serving)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def look(credentials: Credentials, **settings: Any) -> dict[str, Finding]:
    options = DoctorSettings(**{"metrics_port": 0, "timeout_s": 3, **settings})
    return {each.check: each for each in await look_at_peers(options, credentials)}


def failed(findings: dict[str, Finding]) -> dict[str, str]:
    return {
        each.check: f"{each.message} | {each.remedy}"
        for each in findings.values()
        if each.level is Level.FAIL
    }


async def test_good_workers_are_found_good() -> None:
    credentials = Credentials(token=TOKEN)
    async with (
        worker(credentials) as one,
        worker(credentials, role=worker_pb2.ROLE_DECODE) as other,
    ):
        findings = await look(credentials, prefill=(one,), decode=(other,))
    assert not failed(findings)
    assert "digest 30313233" in findings[f"prefill {one}"].message
    assert findings["digest"].level is Level.OK


@pytest.mark.parametrize("given", ["wrong-token", None])
async def test_a_wrong_token_is_named_as_such(given: str | None) -> None:
    async with worker(Credentials(token=TOKEN)) as address:
        findings = failed(await look(Credentials(token=given), prefill=(address,)))
    ((check, said),) = findings.items()
    assert check == f"prefill {address}: token"
    assert "same auth_token" in said
    assert ("none is given" in said) == (given is None)


async def test_a_dead_port_and_an_unknown_name_are_named_as_such() -> None:
    dead = f"127.0.0.1:{free_port()}"
    findings = failed(await look(Credentials(), prefill=(dead,), decode=("nowhere.invalid:9001",)))
    assert "Connection refused" in findings[f"prefill {dead}: port"]
    assert "can't be resolved" in findings["decode nowhere.invalid:9001: dns"]


async def test_a_port_that_is_no_worker_s_is_named_as_such() -> None:
    server = await serve_metrics(CollectorRegistry(), "127.0.0.1", 0)
    async with server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        findings = failed(await look(Credentials(), prefill=(address,)))
    assert "does not answer as a worker" in findings[f"prefill {address}: grpc"]


async def test_a_worker_that_loads_and_one_in_the_wrong_list_are_warned_of() -> None:
    async with worker(Credentials(), serving=False) as address:
        findings = await look(Credentials(), decode=(address,))
    assert not failed(findings)
    assert "NOT_SERVING" in findings[f"decode {address}: health"].message
    assert "is a prefill worker" in findings[f"decode {address}: role"].message
    assert findings["pools"].level is Level.WARN


async def test_tls_that_does_not_fit_is_named_as_such(tmp_path: Path) -> None:
    ours, others = trustme.CA(), trustme.CA()
    files = {}
    for name, authority in (("ours", ours), ("others", others)):
        authority.cert_pem.write_to_path(str(tmp_path / f"{name}.crt"))
        files[name] = tmp_path / f"{name}.crt"
    issued = ours.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(tmp_path / "tls.key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "tls.crt"))
    secured = Credentials(cert=tmp_path / "tls.crt", key=tmp_path / "tls.key", mutual=False)
    async with worker(secured) as address, worker(Credentials()) as plain:
        check = f"prefill {address}: grpc"
        assert not failed(await look(Credentials(ca=files["ours"]), prefill=(address,)))
        wrong = failed(await look(Credentials(ca=files["others"]), prefill=(address,)))
        assert "comes from this CA" in wrong[check]
        none = failed(await look(Credentials(), prefill=(address,)))
        assert "speaks TLS, and this process was given no CA" in none[check]
        bare = failed(await look(Credentials(ca=files["ours"]), prefill=(plain,)))
        assert "speaks no TLS" in bare[f"prefill {plain}: grpc"]


async def test_links_and_clock_are_read_of_a_worker_s_metrics() -> None:
    registry = CollectorRegistry()
    rate = Gauge("diptych_kv_link_bytes_per_second", "x", ["peer", "transport"], registry=registry)
    for peer, speed in (("p0", 20e9), ("p1", 19e9), ("p2", 0.4e9), ("p3", 0.0)):
        rate.labels(peer, "nixl").set(speed)
    failing = Gauge("diptych_kv_link_failing", "x", ["peer", "transport"], registry=registry)
    failing.labels("p0", "nixl").set(0)
    failing.labels("p4", "nixl").set(1)
    server = await serve_metrics(registry, "127.0.0.1", 0)
    async with server, worker(Credentials(), role=worker_pb2.ROLE_DECODE) as address:
        port = server.sockets[0].getsockname()[1]
        findings = await look(Credentials(), decode=(address,), metrics_port=port)
    bad = {each.check: each.level for each in findings.values() if each.check.startswith("link ")}
    assert bad == {f"link p2 to {address}": "warn", f"link p4 to {address}": "fail"}
    assert not any("clock" in check for check in findings), "this is our own clock"


def test_what_keeps_workers_apart_is_named() -> None:
    def facts(address: str, **changes: Any) -> WorkerFacts:
        return WorkerFacts(
            address=address, listed="decode", health="SERVING", description=description(**changes)
        )

    layout = worker_pb2.KvLayout(num_layers=2, block_size=32, dtype="bfloat16")
    findings = {
        each.check: each
        for each in check_together(
            [
                facts("a:1"),
                facts("b:1", role=worker_pb2.ROLE_DECODE, version="1.1"),
                facts("c:1", model_digest=b"another digest!!", layout=layout),
            ]
        )
    }
    assert findings["digest"].level is Level.FAIL
    assert "on a:1, b:1" in findings["digest"].message
    assert findings["layout"].level is Level.FAIL
    assert findings["version"].level is Level.WARN
    assert [each.level for each in check_clock("x", 45.0)] == [Level.WARN]
    assert not list(check_clock("x", 1.0))


@contextmanager
def router(
    answers: dict[str, tuple[int, object]], tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            text = json.dumps(body).encode()
            self.send_response_only(status)
            self.send_header("Date", "Sun, 22 Nov 2020 12:00:00 GMT")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_what_the_router_says_of_its_workers_is_passed_on() -> None:
    workers = [
        {"address": "p:1", "role": "prefill", "state": "ready"},
        {"address": "d:1", "role": "decode", "state": "lost", "cause": "UNAUTHENTICATED"},
    ]
    not_ready = {"error": {"message": "Not ready: none."}}
    dark = {"prefill": "p", "decode": "d", "failure": "nothing came"}
    requests = [{"mode": mode, "age_s": age} for mode, age in ((None, 1), ("local", 2), ("x", 1e6))]
    answers: dict[str, tuple[int, object]] = {
        "/health": (200, {}),
        "/ready": (503, not_ready),
        "/v1/fleet": (200, {"workers": workers, "links": [dark]}),
        "/v1/requests?limit=500": (200, {"data": requests}),
    }
    with router(answers) as url:
        facts = asyncio.run(look_at_router(url, None, 3))
        findings = {each.check: each for each in check_router(facts)}
        assert "none." in findings["router"].message
        assert "UNAUTHENTICATED" in findings["router: d:1"].message
        assert "behind" in findings["router: clock"].message
        assert "1 prefill, 0 decode" in findings["router: workers"].message
        assert "nothing came" in findings["link p to d"].message
        assert facts.modes == ["local"]
        answers["/v1/fleet"] = (401, {})
        facts = asyncio.run(look_at_router(url, None, 3))
        assert {each.check: each for each in check_router(facts)}["router: workers"].level == "skip"


def test_router_with_a_certificate_of_ones_own_ca(tmp_path: Path) -> None:
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.crt"))
    answers: dict[str, tuple[int, object]] = {
        "/health": (200, {}),
        "/ready": (200, {}),
        "/v1/fleet": (401, {}),
        "/v1/requests?limit=500": (401, {}),
    }
    with router(answers, tls) as url:
        (found,) = check_router(asyncio.run(look_at_router(url, None, 3)))
        assert found.level is Level.FAIL and "--ca" in found.remedy
        trust = trusted(str(tmp_path / "ca.crt"))
        assert asyncio.run(look_at_router(url, None, 3, trust)).ready


def test_pools_between_which_no_kv_moves_are_a_failure() -> None:
    both = {"prefill": 1, "decode": 1}
    alone, handed_over, short = "decode_only", "disaggregated", "local"

    def handovers(*modes: str, attached: dict[str, int] = both) -> str:
        facts = RouterFacts(url="u", ready=True, attached=attached, modes=modes)
        found = {each.check: each.level.value for each in check_router(facts)}
        return found.get("hand-overs", "")

    assert handovers(alone, handed_over) == handovers(short, alone) == "fail"
    assert handovers(short, handed_over, alone) == "ok"
    assert handovers() == handovers(short) == "skip"
    assert handovers(alone, attached={"prefill": 0, "decode": 1}) == ""
    facts = RouterFacts(url="u", ready=True, dark_links={("p0", "d0"): "nothing came"})
    (bad,) = [each for each in check_router(facts) if each.level is Level.FAIL]
    assert bad.check == "link p0 to d0" and "nothing came" in bad.message


def test_exit_status_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    dead = f"127.0.0.1:{free_port()}"
    common = ["--role", "elsewhere", "--metrics-port", "0"]
    assert main([*common, "--prefill", dead, "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    (bad,) = [each for each in findings if each["level"] == "fail"]
    assert dead in bad["message"]
    assert bad["remedy"]
    assert main(common) == 0
    assert "0 failed" in capsys.readouterr().out
    assert main([*common, "--tls-ca", "/no/such/file"]) == 2
    assert "tls_ca" in capsys.readouterr().err
