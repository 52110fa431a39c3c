"""Which resources the server has, and what it says of them in its discovery documents."""

from collections.abc import Iterable
from dataclasses import dataclass

VERBS = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One resource."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    scale: bool = False
    """It has a scale subresource."""

    @property
    def group_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As messages and RBAC name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def root(self) -> str:
        """Where its group and version are served, without a slash at either end."""
        return f"apis/{self.group_version}" if self.group else f"api/{self.version}"


def _kinds(group_version: str, *rows: str) -> list[Kind]:
    """Rows are `Kind plural [short] [cluster] [scale]`."""
    group, _, version = group_version.rpartition("/")
    made = []
    for row in rows:
        kind, plural, *rest = row.split()
        made.append(
            Kind(
                group=group,
                version=version,
                kind=kind,
                plural=plural,
                namespaced="cluster" not in rest,
                scale="scale" in rest,
                short=tuple(word for word in rest if word not in ("cluster", "scale")),
            )
        )
    return made


BUILT_IN = [
    *_kinds(
        "v1",
        "Namespace namespaces ns cluster",
        "Node nodes no cluster",
        "PersistentVolume persistentvolumes pv cluster",
        "Pod pods po",
        "Service services svc",
        "Endpoints endpoints ep",
        "ConfigMap configmaps cm",
        "Secret secrets",
        "ServiceAccount serviceaccounts sa",
        "PersistentVolumeClaim persistentvolumeclaims pvc",
        "Event events ev",
    ),
    *_kinds(
        "apps/v1",
        "Deployment deployments deploy scale",
        "StatefulSet statefulsets sts scale",
        "ReplicaSet replicasets rs scale",
        "DaemonSet daemonsets ds",
    ),
    *_kinds("batch/v1", "Job jobs", "CronJob cronjobs cj"),
    *_kinds("discovery.k8s.io/v1", "EndpointSlice endpointslices"),
    *_kinds(
        "networking.k8s.io/v1", "Ingress ingresses ing", "NetworkPolicy networkpolicies netpol"
    ),
    *_kinds("policy/v1", "PodDisruptionBudget poddisruptionbudgets pdb"),
    *_kinds("autoscaling/v2", "HorizontalPodAutoscaler horizontalpodautoscalers hpa"),
    *_kinds("coordination.k8s.io/v1", "Lease leases"),
    *_kinds(
        "rbac.authorization.k8s.io/v1",
        "Role roles",
        "RoleBinding rolebindings",
        "ClusterRole clusterroles cluster",
        "ClusterRoleBinding clusterrolebindings cluster",
    ),
]
CUSTOM = [
    *_kinds("gateway.networking.k8s.io/v1", "HTTPRoute httproutes"),
    *_kinds(
        "monitoring.coreos.com/v1",
        "ServiceMonitor servicemonitors",
        "PodMonitor podmonitors",
        "PrometheusRule prometheusrules",
    ),
    *_kinds("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet leaderworkersets lws scale"),
    *_kinds("keda.sh/v1alpha1", "ScaledObject scaledobjects so"),
    *_kinds("cert-manager.io/v1", "Certificate certificates", "Issuer issuers"),
]
"""Kinds of extensions; a server has them only if asked to."""


def versions() -> dict[str, object]:
    """GET /api."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def groups(kinds: Iterable[Kind]) -> dict[str, object]:
    """GET /apis."""
    named = {}
    for each in kinds:
        if each.group:
            version = {"groupVersion": each.group_version, "version": each.version}
            named[each.group] = {
                "name": each.group,
                "versions": [version],
                "preferredVersion": version,
            }
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(named.values())}


def resources(kinds: Iterable[Kind], root: str) -> dict[str, object] | None:
    """GET of one group and version, such as apis/apps/v1; None if there is none."""
    served = [each for each in kinds if each.root == root]
    if not served:
        return None
    rows: list[dict[str, object]] = []
    for each in served:
        row = {"namespaced": each.namespaced, "kind": each.kind, "singularName": ""}
        about = {"verbs": VERBS, "shortNames": list(each.short)}
        rows.append({**row, **about, "name": each.plural, "singularName": each.kind.lower()})
        part = {**row, "verbs": ["get", "patch", "update"]}
        rows.append({**part, "name": f"{each.plural}/status"})
        if each.scale:
            scale = {"group": "autoscaling", "version": "v1", "kind": "Scale"}
            rows.append({**part, **scale, "name": f"{each.plural}/scale"})
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": served[0].group_version,
        "resources": rows,
    }


def openapi_paths(kinds: Iterable[Kind]) -> dict[str, object]:
    """GET /openapi/v3."""
    roots = {each.root for each in kinds}
    return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots}}


def openapi(kinds: Iterable[Kind], root: str) -> dict[str, object]:
    """GET /openapi/v3/apis/apps/v1: that the server checks fields itself, and nothing of fields."""
    paths = {}
    for each in kinds:
        if each.root == root:
            place = "/namespaces/{namespace}" if each.namespaced else ""
            paths[f"/{root}{place}/{each.plural}/{{name}}"] = {
                "patch": {
                    "operationId": f"patch{each.kind}",
                    "parameters": [
                        {"name": name, "in": "query", "schema": {"type": "string"}}
                        for name in ("dryRun", "fieldManager", "fieldValidation", "force")
                    ],
                    "responses": {"200": {"description": "OK"}},
                    "x-kubernetes-group-version-kind": {
                        "group": each.group,
                        "version": each.version,
                        "kind": each.kind,
                    },
                }
            }
    info = {"title": "Kubernetes", "version": "v1.35.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}
