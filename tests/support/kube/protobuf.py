"""Reads the bodies that typed Go clients send: they speak protobuf and take JSON for an answer.

Only the kinds that kubectl and helm send so, and of those only what a client may set.

Source: k8s.io/apimachinery runtime.Unknown behind the four bytes `k8s\\0`, and generated.proto of
k8s.io/api and apimachinery.
"""

import base64
from collections.abc import Iterator
from typing import Any

from tests.support.kube.failure import Failure

Schema = dict[int, tuple[str, Any]]
"""Field number to name and type: str, bytes, int, bool, a Schema, `[type]` of a repeated field, or
`(type,)` of a map from strings."""

OWNER: Schema = {
    1: ("kind", str),
    3: ("name", str),
    4: ("uid", str),
    5: ("apiVersion", str),
    6: ("controller", bool),
    7: ("blockOwnerDeletion", bool),
}
METADATA: Schema = {
    1: ("name", str),
    2: ("generateName", str),
    3: ("namespace", str),
    5: ("uid", str),
    6: ("resourceVersion", str),
    11: ("labels", (str,)),
    12: ("annotations", (str,)),
    13: ("ownerReferences", [OWNER]),
    14: ("finalizers", [str]),
}
ATTRIBUTES: Schema = {
    1: ("namespace", str),
    2: ("verb", str),
    3: ("group", str),
    5: ("resource", str),
    6: ("subresource", str),
    7: ("name", str),
}
KINDS: dict[str, Schema] = {
    "Namespace": {1: ("metadata", METADATA)},
    "Secret": {
        1: ("metadata", METADATA),
        2: ("data", (bytes,)),
        3: ("type", str),
        4: ("stringData", (str,)),
        5: ("immutable", bool),
    },
    "ConfigMap": {
        1: ("metadata", METADATA),
        2: ("data", (str,)),
        3: ("binaryData", (bytes,)),
        4: ("immutable", bool),
    },
    "ServiceAccount": {1: ("metadata", METADATA), 4: ("automountServiceAccountToken", bool)},
    "DeleteOptions": {
        1: ("gracePeriodSeconds", int),
        2: ("preconditions", {1: ("uid", str), 2: ("resourceVersion", str)}),
        4: ("propagationPolicy", str),
        5: ("dryRun", [str]),
    },
    "SelfSubjectAccessReview": {
        1: ("metadata", METADATA),
        2: ("spec", {1: ("resourceAttributes", ATTRIBUTES)}),
    },
}
_MAGIC = b"k8s\0"
_UNKNOWN: Schema = {1: ("type", {1: ("apiVersion", str), 2: ("kind", str)}), 2: ("raw", memoryview)}


def read(body: bytes) -> dict[str, Any]:
    """The object in a body.

    Raises:
        Failure: 415, if it is none that is known here.
    """
    if not body.startswith(_MAGIC):
        raise Failure(415, "the body is no protobuf of Kubernetes")
    unknown = _message(body[len(_MAGIC) :], _UNKNOWN)
    schema = KINDS.get(unknown["type"]["kind"])
    if schema is None:
        raise Failure(415, f"{unknown['type']['kind']} is read from JSON alone")
    return {**unknown["type"], **_message(bytes(unknown["raw"]), schema)}


def _message(data: bytes, schema: Schema) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, value in _fields(data):
        name, kind = schema.get(number, ("", None))
        match kind:
            case None:
                continue
            case [one] if isinstance(kind, list):
                found.setdefault(name, []).append(_value(value, one))
            case (one,):
                entry = _message(value, {1: ("key", str), 2: ("value", one)})
                found.setdefault(name, {})[entry.get("key", "")] = entry.get("value", "")
            case _:
                found[name] = _value(value, kind)
    # Go writes empty strings of fields that are not set.
    return {name: value for name, value in found.items() if value not in ("", {})}


def _value(value: Any, kind: Any) -> Any:
    if isinstance(kind, dict):
        return _message(value, kind)
    if kind is bytes:
        return base64.b64encode(value).decode()
    return value.decode() if kind is str else kind(value)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
                yield tag >> 3, value
            case 2:
                size, at = _varint(data, at)
                yield tag >> 3, data[at : at + size]
                at += size
            case wire:
                at += {1: 8, 5: 4}[wire]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
