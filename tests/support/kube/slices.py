"""EndpointSlices as the controller of Kubernetes writes them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from router.fleet.kubernetes.slices import Census, census, parse_slice


def endpoint(
    address: str,
    *,
    terminating: bool = False,
    serving: bool = True,
    zone: str | None = None,
    node: str | None = None,
) -> dict[str, Any]:
    """One pod of a Service that publishes addresses of pods that are not ready, too."""
    conditions = {"ready": True, "serving": serving, "terminating": terminating}
    made: dict[str, Any] = {"addresses": [address], "conditions": conditions}
    return made | ({"zone": zone} if zone else {}) | ({"nodeName": node} if node else {})


def endpoint_slice(
    name: str,
    endpoints: Sequence[str | Mapping[str, Any]] = (),
    *,
    role: str | None = "decode",
    pool: str = "decode",
    service: str | None = None,
    port: int = 9001,
    family: str = "IPv4",
    namespace: str = "default",
) -> dict[str, Any]:
    """A slice of the Service of one pool."""
    labels = {
        "app.kubernetes.io/part-of": "diptych",
        "kubernetes.io/service-name": service or f"diptych-{pool}",
        "diptych.io/pool": pool,
        **({"diptych.io/role": role} if role else {}),
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": namespace, "labels": labels},
        "addressType": family,
        "endpoints": [endpoint(e) if isinstance(e, str) else dict(e) for e in endpoints],
        "ports": [
            {"name": "grpc", "port": port, "protocol": "TCP"},
            {"name": "metrics", "port": 9101, "protocol": "TCP"},
        ],
    }


def census_of(items: Iterable[Mapping[str, Any]]) -> Census:
    """What slices in the API's own form list."""
    return census(map(parse_slice, items))
