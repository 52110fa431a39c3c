"""Discovery through Kubernetes against a server that restarts, forgets, refuses and hangs up."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from core.clock import monotonic
from core.errors import ConfigError
from router.fleet.kubernetes.api import KubernetesApi
from router.fleet.kubernetes.discovery import KubernetesDiscovery
from router.fleet.kubernetes.metrics import DiscoveryMetrics
from router.fleet.kubernetes.watch import WatchTimes
from tests.support.discovery import Told
from tests.support.kube.failure import Failure
from tests.support.kube.server import DIRECT, KubeServer, kube_server
from tests.support.kube.slices import endpoint, endpoint_slice
from tests.support.proxy import proxy

TIMES = WatchTimes(watch_s=20.0, backoff_first_s=0.02, backoff_max_s=0.1)
SELECTOR = "app.kubernetes.io/part-of=diptych"
DEADLINE_S = 10.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    with kube_server(tmp_path_factory.mktemp("kube")) as running:
        yield running


@pytest.fixture
def server(shared: KubeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubeServer]:
    """The shared server without slices and in a good mood."""
    for item in shared.find("EndpointSlice"):
        shared.delete("EndpointSlice", item["metadata"]["name"])
    shared.refuse(lambda verb, resource: None)
    for name, value in DIRECT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KUBECONFIG", str(shared.kubeconfig()))
    yield shared


class Running:
    """A discovery that runs, and what it said."""

    def __init__(self, times: WatchTimes = TIMES) -> None:
        self.told = Told()
        self.registry = CollectorRegistry()
        metrics = DiscoveryMetrics(self.registry, monotonic)
        self.discovery = KubernetesDiscovery(
            KubernetesApi(None, SELECTOR), metrics, monotonic, times
        )

    @property
    def addresses(self) -> set[str]:
        return set(self.told.members)

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"diptych_discovery_{name}", labels) or 0.0

    async def sees(self, *hosts: str) -> None:
        wanted = {f"{host}:9001" for host in hosts}
        await until(lambda: self.addresses == wanted, lambda: f"{self.addresses} != {wanted}")


@asynccontextmanager
async def running(times: WatchTimes = TIMES) -> AsyncIterator[Running]:
    it = Running(times)
    task = asyncio.create_task(it.discovery.run(it.told))
    try:
        yield it
    finally:
        began = time.monotonic()
        task.cancel()
        await asyncio.wait([task])
        assert time.monotonic() - began < 1.5, "the thread hangs"


async def until(condition: Callable[[], object], what: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.01)


async def watched(server: KubeServer) -> None:
    """Until the watch is open, so that what comes next comes as an event."""
    await until(lambda: server.watching("endpointslices") == 1, lambda: "no watch is open")


async def test_workers_come_change_and_go(server: KubeServer) -> None:
    server.put(endpoint_slice("a", ["10.0.0.1"], role="prefill"))
    async with running() as it:
        await it.sees("10.0.0.1")
        await watched(server)
        server.put(endpoint_slice("b", ["10.0.0.2", "10.0.0.3"]))
        await it.sees("10.0.0.1", "10.0.0.2", "10.0.0.3")
        server.put(endpoint_slice("b", [endpoint("10.0.0.2", terminating=True), "10.0.0.3"]))
        await until(lambda: it.told.members["10.0.0.2:9001"].draining)
        server.delete("EndpointSlice", "b")
        await it.sees("10.0.0.1")
        assert it.metric("members", role="prefill", state="listed") == 1
        assert it.metric("members", role="decode", state="draining") == 0
        assert it.metric("requests_total", verb="list", outcome="ok") == 1, "events were enough"
    lists = server.asked("list", "endpointslices")
    assert it.discovery.shortage.startswith(
        "Kubernetes lists none: endpointslices.discovery.k8s.io"
    )
    assert lists == server.asked("list", "endpointslices"), "it goes on after its end"


async def test_slices_without_the_selected_labels_are_not_even_sent(server: KubeServer) -> None:
    other = endpoint_slice("other", ["10.0.0.1"])
    other["metadata"]["labels"]["app.kubernetes.io/part-of"] = "something"
    server.put(other)
    async with running() as it:
        await watched(server)
        other["metadata"]["labels"]["app.kubernetes.io/part-of"] = "diptych"
        server.put(other)
        await it.sees("10.0.0.1")
        other["metadata"]["labels"]["app.kubernetes.io/part-of"] = "something"
        server.put(other)
        await it.sees()
        assert it.metric("events_total", type="deleted") == 1


async def test_many_slices_come_in_pages(
    server: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.fleet.kubernetes.api.PAGE", 2)
    for index in range(5):
        server.put(endpoint_slice(f"s{index}", [f"10.0.0.{index}"]))
    before = server.asked("list", "endpointslices")
    async with running() as it:
        await it.sees(*(f"10.0.0.{index}" for index in range(5)))
    assert server.asked("list", "endpointslices") - before == 3


async def test_watch_that_is_cut_within_a_line_goes_on_where_it_was(server: KubeServer) -> None:
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    async with running() as it:
        await it.sees("10.0.0.1")
        for words in (b"", b'{"type":"MODIFIED","object":{"metadata":{"name":"a","res'):
            await watched(server)
            server.cut_watches(words)
            await until(lambda: server.watching("endpointslices") == 0)
            server.put(endpoint_slice("b", [f"10.0.1.{len(words)}"]))
            await it.sees("10.0.0.1", f"10.0.1.{len(words)}")
        assert it.metric("requests_total", verb="list", outcome="ok") == 1
        assert "~10.0.0.1:9001" not in it.told.changes


async def test_line_that_is_no_event_is_made_good_by_a_list(server: KubeServer) -> None:
    async with running() as it:
        await watched(server)
        server.cut_watches(b"<html>\n")
        await until(lambda: it.metric("requests_total", verb="list", outcome="ok") == 2)
        server.put(endpoint_slice("a", ["10.0.0.1"]))
        await it.sees("10.0.0.1")


async def test_bookmark_saves_a_list_after_compaction(server: KubeServer) -> None:
    async with running() as it:
        await watched(server)
        server.put({"kind": "ConfigMap", "metadata": {"name": "of-nobody"}})
        server.compact()
        server.bookmark()
        await until(lambda: it.metric("events_total", type="bookmark") == 1)
        server.cut_watches()
        server.put(endpoint_slice("a", ["10.0.0.1"]))
        await it.sees("10.0.0.1")
        assert it.metric("requests_total", verb="list", outcome="ok") == 1


@pytest.mark.parametrize("form", ["an event", "a status"])
async def test_gone_is_answered_by_a_list(server: KubeServer, form: str) -> None:
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    server.put(endpoint_slice("b", ["10.0.0.2"]))
    gone = Failure(410, "too old resource version: 1 (9)")
    if form == "a status":
        server.refuse(lambda verb, _: gone if verb == "watch" else None)
    async with running() as it:
        await it.sees("10.0.0.1", "10.0.0.2")
        if form == "an event":
            await watched(server)
            server.stop()
            server.app.store.delete(server.kind("EndpointSlice"), "default", "b")
            server.app.store.compact()
            server.start()
        else:
            server.delete("EndpointSlice", "b")
        await it.sees("10.0.0.1")
        assert it.metric("requests_total", verb="list", outcome="ok") >= 2
        assert "-10.0.0.1:9001" not in it.told.changes


@pytest.mark.parametrize("restored", [False, True], ids=["same", "restored"])
async def test_losing_the_api_server_drops_nobody(server: KubeServer, restored: bool) -> None:
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    async with running() as it:
        await it.sees("10.0.0.1")
        await watched(server)
        server.stop()
        await until(lambda: it.metric("requests_total", verb="list", outcome="unreachable") >= 3)
        assert it.told.changes == ["+10.0.0.1:9001"]
        assert "can't be reached" in it.discovery.shortage
        assert it.metric("connected") == 0
        age = it.metric("last_sync_age_seconds")
        await until(lambda: it.metric("last_sync_age_seconds") > age)
        if restored:
            server.app.store.restore()
        server.app.store.create(
            server.kind("EndpointSlice"), "default", endpoint_slice("b", ["10.0.0.2"])
        )
        server.start()
        await it.sees("10.0.0.1", "10.0.0.2")
        assert "-10.0.0.1:9001" not in it.told.changes
        await until(lambda: it.metric("connected") == 1)


async def test_watch_ends_in_time_and_goes_on_without_a_list(server: KubeServer) -> None:
    async with running(WatchTimes(watch_s=0.5, backoff_first_s=0.02)) as it:
        await until(lambda: it.metric("requests_total", verb="watch", outcome="ok") >= 2)
        assert it.metric("requests_total", verb="list", outcome="ok") == 1


async def test_connection_that_died_without_a_word_is_noticed(
    server: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.fleet.kubernetes.api.GRACE_S", 0.2)
    monkeypatch.setattr("router.fleet.kubernetes.api.CONNECT_S", 0.3)
    with proxy(("127.0.0.1", 0), ("127.0.0.1", server.port)) as between:
        config = server.kubeconfig(port=between.address[1])
        monkeypatch.setenv("KUBECONFIG", str(config))
        server.put(endpoint_slice("a", ["10.0.0.1"]))
        times = WatchTimes(watch_s=1.0, backoff_first_s=0.02, backoff_max_s=0.1)
        async with running(times) as it:
            await it.sees("10.0.0.1")
            await watched(server)
            between.black_hole()
            server.put(endpoint_slice("b", ["10.0.0.2"]))
            await until(lambda: it.metric("requests_total", verb="watch", outcome="unreachable"))
            assert it.told.changes == ["+10.0.0.1:9001"]
            between.mend()
            await it.sees("10.0.0.1", "10.0.0.2")


@pytest.mark.parametrize("verb", ["list", "watch"])
async def test_missing_right_is_named(
    server: KubeServer, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = server.token("router")
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(token)))
    verbs = [each for each in ("list", "watch") if each != verb]
    rule = {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": verbs}
    role = {"kind": "Role", "metadata": {"name": "router"}, "rules": [rule]}
    server.put(role)
    server.put(
        {
            "kind": "RoleBinding",
            "metadata": {"name": "router"},
            "roleRef": {"kind": "Role", "name": "router"},
            "subjects": [{"kind": "ServiceAccount", "name": "router", "namespace": "default"}],
        }
    )
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    async with running() as it:
        await until(lambda: it.metric("requests_total", verb=verb, outcome="forbidden") >= 1)
        await until(lambda: f"with the verb '{verb}' on them" in it.discovery.shortage)
        assert 'User "system:serviceaccount:default:router"' in it.discovery.shortage
        server.put({**role, "rules": [{**rule, "verbs": ["list", "watch"]}]})
        await it.sees("10.0.0.1")
        await watched(server)


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (Failure(401, "Unauthorized"), "unauthorized"),
        (Failure(429, "later"), "throttled"),
        (Failure(500, "etcd is gone"), "error"),
    ],
)
async def test_refusals_are_counted_and_outlived(
    server: KubeServer, failure: Failure, outcome: str
) -> None:
    server.refuse(lambda verb, _: failure)
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    async with running() as it:
        await until(lambda: it.metric("requests_total", verb="list", outcome=outcome) >= 2)
        server.refuse(lambda verb, _: None)
        await it.sees("10.0.0.1")


async def test_pod_finds_the_server_by_its_own_credentials(
    server: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.put({"kind": "Namespace", "metadata": {"name": "serving"}})
    server.put(endpoint_slice("a", ["10.0.0.1"], namespace="serving"))
    (tmp_path / "token").write_text("admin")
    (tmp_path / "namespace").write_text("serving\n")
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    loader = "kubernetes.config.incluster_config.SERVICE_"
    monkeypatch.setattr(f"{loader}TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(f"{loader}CERT_FILENAME", str(server.folder / "ca.crt"))
    monkeypatch.setattr("router.fleet.kubernetes.connection.NAMESPACE_FILE", tmp_path / "namespace")
    async with running() as it:
        await it.sees("10.0.0.1")
    server.delete("EndpointSlice", "a", "serving")


def test_no_api_server_at_all_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="KUBECONFIG"):
        KubernetesApi(None, SELECTOR)


def test_client_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"'kubernetes': pip install 'diptych\[router,k8s\]'"):
        KubernetesApi(None, SELECTOR)
