"""`diptych autoscale` against an API server and a router: rights, conflicts, the whole process."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from core.clock import monotonic
from core.errors import UnavailableError
from diptych.autoscale.routers import RouterSource
from diptych.autoscale.scale_api import ScaleApi, Target
from diptych.autoscale.signals import SignalWindow, Targets
from router.api.metrics import ApiMetrics
from router.api.slo import SloTargets
from router.metrics import FleetMetrics
from router.scaling import show_scaling_signals
from tests.support.kube.kinds import BUILT_IN, CUSTOM
from tests.support.kube.server import KubeServer, environment, kube_server
from tests.support.process import free_port, running, wait_until
from tests.unit.diptych.autoscale.test_signals import Fleet

KINDS = (("Deployment", "apps/v1"), ("StatefulSet", "apps/v1"))
LWS = ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1")
RULES = [
    {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "patch"]},
    {"apiGroups": ["apps"], "resources": ["statefulsets/scale"], "verbs": ["get"]},
    {
        "apiGroups": ["leaderworkerset.x-k8s.io"],
        "resources": ["leaderworkersets/scale"],
        "verbs": ["get", "patch"],
    },
]


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    with kube_server(tmp_path_factory.mktemp("kube"), [*BUILT_IN, *CUSTOM]) as server:
        metadata = {"name": "autoscale", "namespace": "default"}
        rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": metadata}
        server.put({**rbac, "kind": "Role", "rules": RULES})
        account = {"kind": "ServiceAccount", "name": "autoscale", "namespace": "default"}
        server.put(
            {
                **rbac,
                "kind": "RoleBinding",
                "subjects": [account],
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "autoscale"
                },
            }
        )  # fmt: skip
        yield server


def put(kube: KubeServer, kind: str, version: str, name: str, replicas: int) -> None:
    kube.put(
        {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"replicas": replicas},
        }
    )


@pytest.fixture
def api(kube: KubeServer, monkeypatch: pytest.MonkeyPatch) -> ScaleApi:
    """With no more rights than docs/autoscaling.md names."""
    monkeypatch.setenv("KUBECONFIG", str(kube.kubeconfig(kube.token("autoscale"))))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return ScaleApi(None)


@pytest.mark.parametrize(("kind", "version"), [KINDS[0], LWS])
def test_scale_is_read_and_set(kube: KubeServer, api: ScaleApi, kind: str, version: str) -> None:
    put(kube, kind, version, "pool", 2)
    target = Target.parse(f"{kind.lower()}/pool")
    scale = api.read(target)
    assert scale.replicas == 2
    api.write(target, 5, scale.version)
    assert kube.get(kind, "pool")["spec"]["replicas"] == 5
    with pytest.raises(UnavailableError, match="409"):
        api.write(target, 9, scale.version)
    assert kube.get(kind, "pool")["spec"]["replicas"] == 5, "somebody else's change stays"


def test_what_is_missing_is_named(kube: KubeServer, api: ScaleApi) -> None:
    put(kube, "StatefulSet", "apps/v1", "pool", 2)
    target = Target.parse("statefulset/pool")
    scale = api.read(target)
    with pytest.raises(UnavailableError, match="verb 'patch' on statefulsets/scale of apps"):
        api.write(target, 3, scale.version)
    with pytest.raises(UnavailableError, match="404"):
        api.read(Target.parse("deployment/none"))
    for wrong in ("pool", "pod/pool", "deployment/", "deployment/A b"):
        with pytest.raises(ValueError, match="is not kind/name"):
            Target.parse(wrong)


@pytest.fixture
def router() -> Iterator[int]:
    """Port of what exposes the metrics of a router whose prefill pool has a long backlog."""
    registry, fleet = CollectorRegistry(), Fleet()
    counts = FleetMetrics(registry)
    counts.watch_workers(lambda: [(each.role, each.state) for each in fleet.statuses])
    api = ApiMetrics(registry, SloTargets())
    show_scaling_signals(registry, fleet, fleet, assumed_tokens_per_s=1.0)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            api.prompt_tokens.inc(10)
            body = generate_latest(registry)
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("dry", [False, True])
def test_the_process_scales_what_is_strained(
    kube: KubeServer, router: int, tmp_path: Path, dry: bool
) -> None:
    put(kube, "Deployment", "apps/v1", "prefill", 1)
    put(kube, "Deployment", "apps/v1", "decode", 1)
    port = free_port()
    command = [
        *(sys.executable, "-m", "diptych", "autoscale", "--router", f"http://127.0.0.1:{router}"),
        *("--prefill", "deployment/prefill", "--decode", "deployment/decode"),
        *("--interval-s", "0.2", "--metrics-port", str(port), "--up-pause-s", "0"),
        *(["--dry-run"] if dry else []),
    ]
    env = environment(kube.kubeconfig(kube.token("autoscale")))
    with running(command, name="autoscale", env=env) as process:

        def metrics() -> str:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
            except httpx.TransportError:
                return ""

        def replicas() -> int:
            found: int = kube.get("Deployment", "prefill")["spec"]["replicas"]
            return found

        if dry:
            wait_until(
                lambda: "would scale prefill" in process.log, 20, "a word", lambda: process.log
            )
            assert replicas() == 1
        else:
            wait_until(lambda: replicas() == 2, 20, "another replica", lambda: process.log)
            # The router goes on to show one ready worker: what was asked for is waited for.
            shown = 'diptych_autoscale_replicas{role="prefill"} 2.0'
            wait_until(lambda: shown in metrics(), 10, "the metric", metrics)
            assert 'diptych_autoscale_changes_total{direction="up",role="prefill"} 1.0' in metrics()
            assert "backlog is 400% of its limit" in process.log
        assert kube.get("Deployment", "decode")["spec"]["replicas"] == 1
        process.popen.terminate()
        assert process.popen.wait(10) == 0, process.log


async def test_every_router_behind_a_name_is_asked_and_a_missing_one_is_known(
    router: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = ["127.0.0.1", "127.0.0.2"]

    async def addresses(*_: object, **__: object) -> list[tuple[object, ...]]:
        return [(None, None, None, "", (host, router)) for host in hosts]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", addresses)
    targets = Targets(backlog_s=0.5, busy=0.7, kv=0.8, batch=0.8, itl_s=0.05)
    source = RouterSource(
        f"http://routers:{router}",
        SignalWindow(targets, 60.0),
        api_key=None,
        timeout_s=5.0,
        clock=monotonic,
    )
    signals = await source.signals()
    assert signals is not None
    assert not signals.prefill.complete, "nobody answers at 127.0.0.2"
    hosts.pop()
    signals = await source.signals()
    assert signals is not None
    assert signals.prefill.complete
    hosts[:] = ["127.0.0.2"]
    assert await source.signals() is None
