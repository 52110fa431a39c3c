"""JSON patch, JSON merge patch and strategic merge patch.

Source: RFC 6902, RFC 7386, and Kubernetes' strategic merge patch with its directives.
"""

import copy
from typing import Any

from tests.support.kube.failure import Failure
from tests.support.kube.schema import item_key, list_keys

Object = dict[str, Any]


def merge(live: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    merged = dict(live) if isinstance(live, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def json_patch(live: Object, operations: list[Object]) -> Object:
    """RFC 6902 without `move` and `copy`."""
    root: dict[str, Any] = {"": copy.deepcopy(live)}
    for operation in operations:
        steps = [s.replace("~1", "/").replace("~0", "~") for s in operation["path"].split("/")]
        try:
            target: Any = root
            for step in steps[:-1]:
                target = target[int(step)] if isinstance(target, list) else target[step]
            last: Any = steps[-1]
            if isinstance(target, list):
                last = len(target) if last == "-" else int(last)
            match operation["op"]:
                case "test":
                    if target[last] != operation["value"]:
                        raise Failure(422, f"testing value {operation['path']} failed")
                case "remove":
                    del target[last]
                case "add" if isinstance(target, list):
                    target.insert(last, operation["value"])
                case "add" | "replace":
                    if operation["op"] == "replace":
                        target[last]
                    target[last] = operation["value"]
                case other:
                    raise Failure(400, f"unknown operation {other}")
        except (LookupError, ValueError, TypeError) as error:
            raise Failure(422, f"{operation}: {error!r}") from None
    patched: Object = root[""]
    return patched


def strategic(live: Object, patch: Object) -> Object:
    """A strategic merge patch of an object whose kind it says."""
    return _strategic(live, patch, live["kind"], ())


def _strategic(live: Any, patch: Any, kind: str, path: tuple[str, ...]) -> Any:
    if not isinstance(patch, dict) or patch.get("$patch") == "replace":
        return (
            {k: v for k, v in patch.items() if k != "$patch"} if isinstance(patch, dict) else patch
        )
    merged = dict(live) if isinstance(live, dict) else {}
    if (retained := patch.get("$retainKeys")) is not None:
        merged = {key: value for key, value in merged.items() if key in retained}
    for key, value in patch.items():
        if key.startswith("$"):
            directive, _, field = key.partition("/")
            if directive == "$deleteFromPrimitiveList":
                merged[field] = [each for each in merged.get(field, []) if each not in value]
            continue  # $setElementOrder is about looks alone, $patch and $retainKeys are done
        keys = list_keys(kind, (*path, key))[:1]
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, list) and keys:
            items = merged.get(key) or []
            merged[key] = _strategic_list(items, value, keys, kind, (*path, key))
        else:
            merged[key] = _strategic(merged.get(key), value, kind, (*path, key))
    return merged


def _strategic_list(
    live: list[Any], patch: list[Any], keys: tuple[str, ...], kind: str, path: tuple[str, ...]
) -> list[Any]:
    if any(item.get("$patch") == "replace" for item in patch):
        return [item for item in patch if "$patch" not in item]
    items = {item_key(item, keys): item for item in live}
    for item in patch:
        key = item_key(item, keys)
        if item.get("$patch") == "delete":
            items.pop(key, None)
        else:
            items[key] = _strategic(items.get(key), item, kind, path)
    return list(items.values())
