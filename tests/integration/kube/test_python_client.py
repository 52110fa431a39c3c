"""The tests' API server is one that the Python client takes for real."""

from collections.abc import Iterator

import kubernetes
import pytest
from kubernetes.client.exceptions import ApiException

from tests.support.kube.server import DIRECT, KubeServer
from tests.support.kube.slices import endpoint_slice


@pytest.fixture
def client(
    server: KubeServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[kubernetes.client.ApiClient]:
    for name, value in DIRECT.items():
        monkeypatch.setenv(name, value)
    made = kubernetes.config.new_client_from_config(str(server.kubeconfig()))
    yield made
    made.rest_client.pool_manager.clear()
    made.close()


def test_objects_have_versions_and_old_ones_conflict(client: kubernetes.client.ApiClient) -> None:
    core = kubernetes.client.CoreV1Api(client)
    body = {"metadata": {"generateName": "c-"}, "data": {"a": "b"}}
    made = core.create_namespaced_config_map("default", body)
    assert made.metadata.name.startswith("c-") and made.metadata.uid
    made.data["a"] = "c"
    changed = core.replace_namespaced_config_map(made.metadata.name, "default", made)
    assert int(changed.metadata.resource_version) > int(made.metadata.resource_version)
    with pytest.raises(ApiException) as caught:
        core.replace_namespaced_config_map(made.metadata.name, "default", made)
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    core.delete_namespaced_config_map(made.metadata.name, "default")
    with pytest.raises(ApiException) as caught:
        core.read_namespaced_config_map(made.metadata.name, "default")
    assert caught.value.status == 404


def test_scale_is_read_and_patched_and_status_is_apart(
    server: KubeServer, client: kubernetes.client.ApiClient
) -> None:
    apps = kubernetes.client.AppsV1Api(client)
    labels = {"app": "s"}
    spec = {"serviceName": "s", "selector": {"matchLabels": labels}}
    spec["template"] = {"metadata": {"labels": labels}, "spec": {"containers": []}}
    server.put({"kind": "StatefulSet", "metadata": {"name": "s"}, "spec": spec})
    server.set_status("StatefulSet", "s", {"replicas": 1})
    scale = apps.read_namespaced_stateful_set_scale("s", "default")
    assert (scale.spec.replicas, scale.status.replicas, scale.status.selector) == (1, 1, "app=s")
    scale = apps.patch_namespaced_stateful_set_scale("s", "default", {"spec": {"replicas": 4}})
    assert scale.spec.replicas == 4
    found = apps.read_namespaced_stateful_set("s", "default")
    assert (found.spec.replicas, found.status.replicas) == (4, 1)
    assert found.metadata.generation == 2
    scale.spec.replicas = 5
    assert apps.replace_namespaced_stateful_set_scale("s", "default", scale).spec.replicas == 5
    with pytest.raises(ApiException, match="has been modified"):
        apps.replace_namespaced_stateful_set_scale("s", "default", scale)


def test_watch_tells_every_change_and_ends_in_time(
    server: KubeServer, client: kubernetes.client.ApiClient
) -> None:
    slices = kubernetes.client.DiscoveryV1Api(client)
    server.put(endpoint_slice("w", ["10.0.0.1"]))
    listed = slices.list_namespaced_endpoint_slice("default")
    server.put(endpoint_slice("w", ["10.0.0.2"]))
    server.delete("EndpointSlice", "w")
    events = kubernetes.watch.Watch().stream(
        slices.list_namespaced_endpoint_slice,
        "default",
        resource_version=listed.metadata.resource_version,
        timeout_seconds=1,
    )
    seen = [(each["type"], each["object"].endpoints[0].addresses) for each in events]
    assert seen == [("MODIFIED", ["10.0.0.2"]), ("DELETED", ["10.0.0.2"])]


def test_pages_are_of_one_moment_until_it_is_compacted(
    server: KubeServer, client: kubernetes.client.ApiClient
) -> None:
    slices = kubernetes.client.DiscoveryV1Api(client)
    for name in "abc":
        server.put(endpoint_slice(name))
    first = slices.list_namespaced_endpoint_slice("default", limit=2)
    assert [each.metadata.name for each in first.items] == ["a", "b"]
    server.delete("EndpointSlice", "c")
    rest = slices.list_namespaced_endpoint_slice("default", _continue=first.metadata._continue)
    assert [each.metadata.name for each in rest.items] == ["c"]
    first = slices.list_namespaced_endpoint_slice("default", limit=1)
    server.compact()
    with pytest.raises(ApiException) as caught:
        slices.list_namespaced_endpoint_slice("default", _continue=first.metadata._continue)
    assert caught.value.status == 410
