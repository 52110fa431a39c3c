"""Which lists are merged item by item, by the built-in kinds' schemas; all others are atomic.

Source: `patchMergeKey` and `x-kubernetes-list-map-keys` of Kubernetes' OpenAPI document, for the
fields that charts write.
"""

POD_SPEC = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "imagePullSecrets": ("name",),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
CONTAINER = {
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
}
DEFAULTS = {"protocol": "TCP"}


def list_keys(kind: str, path: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that tell items of a list apart; none if it is atomic.

    Args:
        kind: of the object.
        path: field names from the object's root to the list.
    """
    *_, parent, last = ("", "", *path)
    if parent in ("containers", "initContainers"):
        return CONTAINER.get(last, ())
    if path == ("metadata", "ownerReferences"):
        return ("uid",)
    if path == ("status", "conditions"):
        return ("type",)
    if kind == "Service":
        return ("port", "protocol") if path == ("spec", "ports") else ()
    return POD_SPEC.get(last, ()) if parent == "spec" else ()


def item_key(item: object, keys: tuple[str, ...]) -> tuple[object, ...]:
    """An item's values of those fields."""
    assert isinstance(item, dict)
    return tuple(item.get(key, DEFAULTS.get(key)) for key in keys)
