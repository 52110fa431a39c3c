"""Plays the endpoint controller: a slice for each worker, as each has a port of its own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.support.cluster import Worker
from tests.support.kube.server import KubeServer
from tests.support.kube.slices import endpoint, endpoint_slice

READER = [
    {
        "apiGroups": ["discovery.k8s.io"],
        "resources": ["endpointslices"],
        "verbs": ["get", "list", "watch"],
    }
]


@dataclass(frozen=True)
class Announcer:
    """Announces workers of this machine as pods of the Services of a namespace."""

    server: KubeServer
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    """On top of those that every slice has."""

    def announce(self, worker: Worker, *, terminating: bool = False, pool: str = "") -> None:
        """List a worker, or list it otherwise."""
        item = endpoint_slice(
            self._name(worker),
            [endpoint("127.0.0.1", terminating=terminating, zone="z1", node="n1")],
            role=worker.role,
            pool=pool or worker.role,
            port=worker.port,
            namespace=self.namespace,
        )
        item["metadata"]["labels"] |= self.labels
        self.server.put(item)

    def withdraw(self, worker: Worker) -> None:
        """List it no longer."""
        self.server.delete("EndpointSlice", self._name(worker), self.namespace)

    def _name(self, worker: Worker) -> str:
        return f"{worker.role}-{worker.port}"


def reader_token(server: KubeServer, name: str, namespace: str = "default") -> str:
    """A token of a service account that may read EndpointSlices of its namespace and no more."""
    server.put(
        {"kind": "Role", "metadata": {"name": name, "namespace": namespace}, "rules": READER}
    )
    subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    server.put(
        {
            "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": namespace},
            "roleRef": {"kind": "Role", "name": name},
            "subjects": [subject],
        }
    )
    return server.token(name, namespace)
