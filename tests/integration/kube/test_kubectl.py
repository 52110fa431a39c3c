"""The tests' API server is one that kubectl takes for real."""

import subprocess
from collections.abc import Iterator

import pytest
import yaml

from scripts.fetch_kubernetes_tools import KubernetesTools
from tests.support.kube.announce import reader_token
from tests.support.kube.clients import Program
from tests.support.kube.server import KubeServer, environment
from tests.support.kube.slices import endpoint_slice

DEPLOYMENT = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {tier: front}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
      - name: a
        image: "x:1"
        env: [{name: ONE, value: "1"}, {name: TWO, value: "2"}]
        ports: [{containerPort: 80}]
      - {name: b, image: "y:1"}
"""


@pytest.fixture
def kubectl(server: KubeServer, tools: KubernetesTools) -> Program:
    return Program(tools.kubectl, server.kubeconfig())


@pytest.fixture
def deployment(kubectl: Program) -> Iterator[str]:
    """Applied for the length of a test."""
    kubectl("apply", "-f", "-", text=DEPLOYMENT)
    yield "deployment/web"
    kubectl("delete", "deployment", "web", "--ignore-not-found")


def containers(server: KubeServer) -> list[dict[str, object]]:
    found: list[dict[str, object]] = server.get("Deployment", "web")["spec"]["template"]["spec"][
        "containers"
    ]
    return found


def test_apply_merges_lists_by_their_keys(
    server: KubeServer, kubectl: Program, deployment: str
) -> None:
    changed = yaml.safe_load(DEPLOYMENT)
    pod = changed["spec"]["template"]["spec"]
    pod["containers"] = [{**pod["containers"][0], "image": "x:2"}]
    pod["containers"][0]["env"] = [{"name": "TWO", "value": "3"}]
    assert "configured" in kubectl("apply", "-f", "-", text=yaml.safe_dump(changed))
    (only,) = containers(server)
    assert (only["image"], only["env"]) == ("x:2", [{"name": "TWO", "value": "3"}])
    assert server.get("Deployment", "web")["metadata"]["generation"] == 2
    assert "unchanged" in kubectl("apply", "-f", "-", text=yaml.safe_dump(changed))


def test_server_side_apply_knows_who_owns_what(
    server: KubeServer, kubectl: Program, deployment: str
) -> None:
    mine = yaml.safe_load(DEPLOYMENT.replace("x:1", "x:3"))
    apply = ("apply", "--server-side", "--field-manager=me", "-f", "-")
    refused = kubectl.refusal(*apply, text=yaml.safe_dump(mine))
    assert "conflict" in refused and "containers" in refused
    kubectl(*apply, "--force-conflicts", text=yaml.safe_dump(mine))
    assert containers(server)[0]["image"] == "x:3"
    kubectl("scale", deployment, "--replicas=5")
    assert "spec.replicas" in kubectl.refusal(*apply, text=yaml.safe_dump(mine))
    del mine["spec"]["replicas"], mine["metadata"]["labels"]
    kubectl(*apply, text=yaml.safe_dump(mine))
    kept = server.get("Deployment", "web")
    assert kept["spec"]["replicas"] == 5, "it is of who scaled it"
    assert kept["metadata"]["labels"] == {"tier": "front"}, "it is of the first apply, too"


def test_get_selects_and_finds_short_names(kubectl: Program, deployment: str) -> None:
    assert "web" in kubectl("get", "deploy", "-l", "tier in (front,back),!other")
    assert "web" not in kubectl("get", "deploy", "-l", "tier!=front")
    assert kubectl.json("get", "deploy", "--field-selector=metadata.name=none")["items"] == []
    assert "not found" in kubectl.refusal("get", "deploy", "none")
    assert "endpointslices" in kubectl("api-resources", "--api-group=discovery.k8s.io")


def test_wait_watches_until_a_status_comes(
    server: KubeServer, tools: KubernetesTools, kubectl: Program, deployment: str
) -> None:
    command = [tools.kubectl, "wait", "--for=condition=Available", deployment, "--timeout=20s"]
    waiting = subprocess.Popen(
        command, env=environment(server.kubeconfig()), stdout=subprocess.PIPE, text=True
    )
    condition = {"type": "Available", "status": "True"}
    server.set_status("Deployment", "web", {"conditions": [condition], "replicas": 2})
    out, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0 and "condition met" in out
    kubectl("delete", deployment)
    assert "NotFound" in kubectl.refusal("get", deployment)


def test_patches_of_all_three_kinds(server: KubeServer, kubectl: Program) -> None:
    kubectl("create", "configmap", "c", "--from-literal=a=1", "--from-literal=b=2")
    assert "already exists" in kubectl.refusal("create", "configmap", "c")
    kubectl("patch", "cm", "c", "--type=strategic", "-p", '{"data": {"a": null, "c": "3"}}')
    kubectl("patch", "cm", "c", "--type=merge", "-p", '{"data": {"d": "4"}}')
    operations = (
        '[{"op": "test", "path": "/data/d", "value": "4"}, {"op":"remove","path":"/data/d"}]'
    )
    kubectl("patch", "cm", "c", "--type=json", "-p", operations)
    assert server.get("ConfigMap", "c")["data"] == {"b": "2", "c": "3"}
    assert "is invalid" in kubectl.refusal("patch", "cm", "c", "--type=json", "-p", operations)


def test_old_version_of_an_object_is_refused(server: KubeServer, kubectl: Program) -> None:
    kubectl("create", "configmap", "old")
    stale = yaml.safe_dump(kubectl.json("get", "cm", "old"))
    kubectl("label", "cm", "old", "a=b")
    assert "has been modified" in kubectl.refusal("replace", "-f", "-", text=stale)


def test_service_account_may_do_what_its_roles_say(
    server: KubeServer, tools: KubernetesTools
) -> None:
    server.put(endpoint_slice("a", ["10.0.0.1"]))
    reader = Program(tools.kubectl, server.kubeconfig(reader_token(server, "reader")))
    assert "a" in reader("get", "endpointslices")
    refused = reader.refusal("delete", "endpointslice", "a")
    assert 'User "system:serviceaccount:default:reader" cannot delete' in refused
    assert "cannot list" in reader.refusal("get", "secrets")
    assert "cannot list" in reader.refusal("get", "endpointslices", "--namespace", "kube-system")
    assert reader("auth", "can-i", "watch", "endpointslices") == "yes\n"
    assert reader.run("auth", "can-i", "create", "pods").stdout.startswith("no")
    stranger = Program(tools.kubectl, server.kubeconfig("nobody"))
    assert "Unauthorized" in stranger.refusal("get", "--raw", "/version")
