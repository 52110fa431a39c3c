"""The chart comes alive: installed by helm, its pods run as processes and find each other."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from scripts.fetch_kubernetes_tools import ToolsUnavailable, fetch
from tests.support.cluster import START_S
from tests.support.kube.clients import Program
from tests.support.kube.controllers import Cluster, Object
from tests.support.kube.kinds import BUILT_IN, CUSTOM
from tests.support.kube.server import DIRECT, KubeServer, kube_server
from tests.support.process import Process, http_status, running, wait_until

CHART = Path(__file__).resolve().parents[2] / "deploy" / "helm" / "diptych"
NAMESPACE = "llm"
SMALL = "poolDefaults.config.kv_cache_memory=64MiB"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[KubeServer]:
    with kube_server(tmp_path, BUILT_IN + CUSTOM) as started:
        yield started


@pytest.fixture
def helm(server: KubeServer) -> Program:
    try:
        return Program(fetch().helm, server.kubeconfig())
    except ToolsUnavailable as reason:
        pytest.skip(str(reason))


def secrets(server: KubeServer) -> dict[str, object]:
    """The chart's own, without those of helm."""
    return {
        each["metadata"]["name"]: each["data"]
        for each in server.find("Secret", NAMESPACE)
        if each["type"] != "helm.sh/release.v1"
    }


def named(pods: list[Object], part: str) -> Object:
    (found,) = [pod for pod in pods if f"-{part}-" in pod["metadata"]["name"]]
    return found


def test_installed_chart_serves_a_completion(
    server: KubeServer, helm: Program, tiny_llama: Path, tmp_path: Path
) -> None:
    where = ("llm", str(CHART), "--namespace", NAMESPACE)
    profile = ("--values", str(CHART / "profiles" / "cpu.yaml"), "--set", SMALL)
    helm("install", *where, "--create-namespace", *profile)
    generated = secrets(server)
    assert generated
    helm("upgrade", *where, *profile, "--set", "router.preStopSeconds=1")
    assert secrets(server) == generated, "an upgrade cut workers off"

    cluster = Cluster(server, NAMESPACE, tmp_path)
    pods = cluster.create_pods()
    router = named(pods, "router")
    account = server.token(router["spec"]["serviceAccountName"], NAMESPACE)
    access = {"KUBECONFIG": str(server.kubeconfig(account, NAMESPACE)), **DIRECT}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(_run(cluster, pod, tiny_llama, access if pod is router else {}))
            for pod in pods
        ]
        url = f"http://{router['status']['podIP']}:8000"
        processes[pods.index(router)].wait_for_line("looking for workers", START_S)
        assert http_status(f"{url}/ready") == 503
        cluster.publish_endpoints()
        wait_until(
            lambda: _ready(url, processes) == {"prefill", "decode"},
            START_S,
            "both pools to be ready",
            lambda: "\n".join(each.log for each in processes),
        )
        workers = httpx.get(f"{url}/v1/fleet", trust_env=False).json()["workers"]
        assert {each["worker_id"] for each in workers} == {
            pod["metadata"]["name"] for pod in pods if pod is not router
        }
        with (
            httpx.Client(trust_env=False) as http,
            OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            answer = client.completions.create(
                model=tiny_llama.name, prompt="one two three four five", max_tokens=5
            )
        assert answer.usage is not None and answer.usage.completion_tokens == 5
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert 'routing_total{mode="disaggregated"} 1.0' in metrics

    helm("uninstall", "llm", "--namespace", NAMESPACE)
    assert not secrets(server) and not server.find("Deployment", NAMESPACE)


def _run(
    cluster: Cluster, pod: Object, model: Path, more: dict[str, str]
) -> AbstractContextManager[Process]:
    host = pod["status"]["podIP"]
    command = cluster.command(pod, f"--host={host}", f"--model={model}")
    env = cluster.environment(pod) | more
    return running(command, name=pod["metadata"]["name"], env=env)


def _ready(url: str, processes: list[Process]) -> set[str]:
    """Roles of the workers that take requests."""
    for each in processes:
        assert each.running, f"{each.name} ended:\n{each.log}"
    workers = httpx.get(f"{url}/v1/fleet", trust_env=False).json()["workers"]
    return {each["role"] for each in workers if each["state"] == "ready"}
