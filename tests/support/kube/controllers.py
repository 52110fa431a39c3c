"""Plays the controllers and the node of a cluster, as far as a chart needs them to come alive.

Deployments become Pods with an address each, pods run as processes of this machine on loopback
addresses of their own, and headless Services get EndpointSlices of the pods that they select.
"""

import base64
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.kube.server import KubeServer

Object = dict[str, Any]
NODE, ZONE = "node-1", "zone-1"


@dataclass(frozen=True)
class Cluster:
    """One namespace of a server."""

    server: KubeServer
    namespace: str
    folder: Path
    """Where pods have their files."""
    _hosts: list[str] = field(
        default_factory=lambda: [f"127.{random.randint(64, 250)}.7.{n}" for n in range(2, 250)]
    )

    def create_pods(self) -> list[Object]:
        """One Pod for each replica of each Deployment."""
        pods = []
        for deployment in self.server.find("Deployment", self.namespace):
            template = deployment["spec"]["template"]
            for index in range(deployment["spec"].get("replicas", 1)):
                name = f"{deployment['metadata']['name']}-{index}"
                metadata = {"name": name, "namespace": self.namespace}
                metadata["labels"] = template["metadata"]["labels"]
                spec = {**template["spec"], "nodeName": NODE}
                item = {"kind": "Pod", "metadata": metadata, "spec": spec}
                self.server.put(item)
                status = {"podIP": self._hosts.pop(), "phase": "Running"}
                self.server.set_status("Pod", name, status, self.namespace)
                pods.append(self.server.get("Pod", name, self.namespace))
        return pods

    def publish_endpoints(self) -> None:
        """One EndpointSlice for each headless Service."""
        pods = self.server.find("Pod", self.namespace)
        for service in self.server.find("Service", self.namespace):
            if service["spec"].get("clusterIP") != "None":
                continue
            name = service["metadata"]["name"]
            chosen = service["spec"]["selector"].items()
            endpoints = [
                {
                    "addresses": [pod["status"]["podIP"]],
                    "conditions": {"ready": True, "serving": True, "terminating": False},
                    "nodeName": NODE,
                    "zone": ZONE,
                    "targetRef": {"kind": "Pod", "name": pod["metadata"]["name"]},
                }
                for pod in pods
                if chosen <= pod["metadata"]["labels"].items()
            ]
            labels = {**service["metadata"]["labels"], "kubernetes.io/service-name": name}
            self.server.put(
                {
                    "apiVersion": "discovery.k8s.io/v1",
                    "kind": "EndpointSlice",
                    "metadata": {
                        "name": f"{name}-abcde",
                        "namespace": self.namespace,
                        "labels": labels,
                    },
                    "addressType": "IPv4",
                    "endpoints": endpoints,
                    "ports": [
                        {"name": port["name"], "port": port["port"], "protocol": "TCP"}
                        for port in service["spec"]["ports"]
                    ],
                }
            )

    def command(self, pod: Object, *more: str) -> list[str]:
        """What the node runs for a pod, with its ConfigMap in place of the mounted one."""
        (container,) = pod["spec"]["containers"]
        program, *words = [*container["command"], *container.get("args", [])]
        assert program == "diptych"
        name = pod["metadata"]["name"]
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        for mount in container["volumeMounts"]:
            if (source := volumes[mount["name"]].get("configMap")) is None:
                continue
            data = self.server.get("ConfigMap", source["name"], self.namespace)["data"]
            file = self.folder / f"{name}.yaml"
            file.write_text(data[mount["subPath"]])
            words = [word.replace(mount["mountPath"], str(file)) for word in words]
        return [sys.executable, "-m", "diptych", *words, *more]

    def environment(self, pod: Object) -> dict[str, str]:
        """A pod's variables, except those that name folders of its image."""
        (container,) = pod["spec"]["containers"]
        found = {}
        for each in container.get("env", []):
            value = each.get("value")
            if value is None:
                value = self._value(each["valueFrom"], pod, container)
            if not value.startswith("/"):
                found[each["name"]] = value
        return found

    def _value(self, source: Mapping[str, Any], pod: Object, container: Object) -> str:
        match source:
            case {"fieldRef": {"fieldPath": path}}:
                value: Any = pod
                for step in path.split("."):
                    value = value[step]
                return str(value)
            case {"resourceFieldRef": {"resource": resource}}:
                kind, _, name = resource.partition(".")
                return str(container["resources"][kind][name])
            case {"secretKeyRef": {"name": name, "key": key}}:
                data = self.server.get("Secret", name, self.namespace)["data"]
                return base64.b64decode(data[key]).decode()
        raise AssertionError(f"this node knows no {source}")
