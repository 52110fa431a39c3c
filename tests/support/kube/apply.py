"""Server-side apply: who owns which fields, what a new configuration changes, where it conflicts.

Fields are held as Kubernetes holds them (fieldsV1): `f:name` for a field, `k:{...}` for an item of
a merged list, `.` for the item itself; nothing below means a value that is owned as a whole.

Source: kubernetes.io/docs/reference/using-api/server-side-apply.
"""

import copy
import json
from typing import Any

from tests.support.kube.failure import Failure
from tests.support.kube.schema import item_key, list_keys

Object = dict[str, Any]
Fields = dict[str, Any]

UNOWNED = {"name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp"}
UNOWNED |= {"managedFields", "selfLink", "deletionTimestamp"}


def owned(item: Object) -> Fields:
    """The fields that a configuration or an object has."""
    body = {key: value for key, value in item.items() if key not in ("apiVersion", "kind")}
    metadata = {k: v for k, v in body.get("metadata", {}).items() if k not in UNOWNED}
    body = {**body, "metadata": metadata} if metadata else {**body, "metadata": None}
    if not metadata:
        del body["metadata"]
    return _fields(body, item["kind"], ())


def applied(live: Object, wanted: Object, manager: str, *, force: bool) -> Object:
    """An object after a manager applied a configuration to it.

    Raises:
        Failure: 409, if it sets fields otherwise than other managers that own them.
    """
    kind = wanted["kind"]
    entries = live["metadata"].get("managedFields", [])
    others = [e for e in entries if (e["manager"], e["operation"]) != (manager, "Apply")]
    before = next((e["fieldsV1"] for e in entries if e not in others), {})
    after = owned(wanted)
    clashes = [
        (each["manager"], path)
        for each in others
        for path in _clashes(live, wanted, after, each["fieldsV1"], kind, ())
    ]
    if clashes and not force:
        causes = [
            {"reason": "FieldManagerConflict", "message": f"conflict with {who!r}", "field": path}
            for who, path in clashes
        ]
        fields = "\n".join(f"- {path}" for _, path in clashes)
        raise Failure(
            409,
            f"Apply failed with {len(clashes)} conflict(s) with {clashes[0][0]!r}:\n{fields}",
            reason="Conflict",
            causes=causes,
        )
    result = _merged(live, wanted, kind, ())
    _prune(result, before, after, [each["fieldsV1"] for each in others], kind, ())
    if clashes:
        others = [
            {**each, "fieldsV1": _without(each["fieldsV1"], _changed_leaves(live, result))}
            for each in others
        ]
    result["metadata"]["managedFields"] = [
        *(each for each in others if each["fieldsV1"]),
        _entry(wanted["apiVersion"], manager, "Apply", after),
    ]
    return result


def updated(before: Object | None, after: Object, manager: str) -> None:
    """Note in an object that a manager set what differs; all of it if it is new."""
    changed = _changed_leaves(before, after) if before else owned(after)
    if not changed:
        return
    entries = after["metadata"].get("managedFields") or []
    mine: Fields = {}
    kept = []
    for each in entries:
        if (each["manager"], each["operation"]) == (manager, "Update"):
            mine = each["fieldsV1"]
        elif rest := _without(each["fieldsV1"], changed):
            kept.append({**each, "fieldsV1": rest})
    entry = _entry(after["apiVersion"], manager, "Update", _union(mine, changed))
    after["metadata"]["managedFields"] = [*kept, entry]


def _entry(version: str, manager: str, operation: str, fields: Fields) -> Object:
    return {
        "manager": manager,
        "operation": operation,
        "apiVersion": version,
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
    }


def _fields(value: Any, kind: str, path: tuple[str, ...]) -> Fields:
    if isinstance(value, dict):
        return {f"f:{key}": _fields(each, kind, (*path, key)) for key, each in value.items()}
    if isinstance(value, list) and (keys := list_keys(kind, path)):
        return {_step(each, keys): {".": {}, **_fields(each, kind, path)} for each in value}
    return {}


def _step(item: Object, keys: tuple[str, ...]) -> str:
    named = {k: v for k, v in zip(keys, item_key(item, keys), strict=True) if v is not None}
    return "k:" + json.dumps(named, separators=(",", ":"))


def _child(value: Any, step: str, kind: str, path: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """What a step leads to, or None, and the path there."""
    if step.startswith("f:"):
        name = step[2:]
        return (value.get(name) if isinstance(value, dict) else None), (*path, name)
    keys = list_keys(kind, path)
    items = value if isinstance(value, list) else []
    return next((each for each in items if _step(each, keys) == step), None), path


def _clashes(
    live: Any, wanted: Any, mine: Fields, theirs: Fields, kind: str, path: tuple[str, ...]
) -> list[str]:
    found = []
    for step in mine.keys() & theirs.keys() - {"."}:
        have, below = _child(live, step, kind, path)
        want, _ = _child(wanted, step, kind, path)
        if mine[step] and theirs[step]:
            found += _clashes(have, want, mine[step], theirs[step], kind, below)
        elif have is not None and have != want:
            found.append("." + ".".join(below))
    return found


def _merged(live: Any, wanted: Any, kind: str, path: tuple[str, ...]) -> Any:
    if isinstance(wanted, dict) and isinstance(live, dict):
        both = {
            key: _merged(live.get(key), each, kind, (*path, key)) for key, each in wanted.items()
        }
        return {**copy.deepcopy(live), **both}
    keys = list_keys(kind, path)
    if isinstance(wanted, list) and isinstance(live, list) and keys:
        items = {_step(each, keys): each for each in live}
        fresh = {
            _step(each, keys): _merged(items.get(_step(each, keys)), each, kind, path)
            for each in wanted
        }
        return [*fresh.values(), *(each for step, each in items.items() if step not in fresh)]
    return copy.deepcopy(wanted)


def _prune(
    value: Any,
    before: Fields,
    after: Fields,
    others: list[Fields],
    kind: str,
    path: tuple[str, ...],
) -> None:
    """Take out what the manager no longer sets and nobody else owns."""
    for step, sub in before.items():
        if step == ".":
            continue
        child, below = _child(value, step, kind, path)
        if child is None:
            continue
        kept = [each[step] for each in others if step in each]
        if step not in after and not kept:
            if isinstance(value, list):
                value.remove(child)
            else:
                del value[step[2:]]
        elif sub:
            _prune(child, sub, after.get(step, {}), kept, kind, below)


def _changed_leaves(before: Object, after: Object) -> Fields:
    return _differing(before, after, owned(after), after["kind"], ())


def _differing(before: Any, after: Any, fields: Fields, kind: str, path: tuple[str, ...]) -> Fields:
    changed = {}
    for step, sub in fields.items():
        old, below = _child(before, step, kind, path)
        new, _ = _child(after, step, kind, path)
        if step == "." or old == new:
            continue
        if sub and old is not None:
            changed[step] = _differing(old, new, sub, kind, below)
        else:
            changed[step] = sub
    return changed


def _without(fields: Fields, taken: Fields) -> Fields:
    rest = {}
    for step, sub in fields.items():
        if step not in taken:
            rest[step] = sub
        elif sub and taken[step] and (left := _without(sub, taken[step])):
            rest[step] = left
    return rest


def _union(one: Fields, other: Fields) -> Fields:
    both = {**one}
    for step, sub in other.items():
        both[step] = _union(both.get(step, {}), sub)
    return both
