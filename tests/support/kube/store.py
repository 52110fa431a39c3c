"""Objects, the log of their changes, and what makes one valid. Owned by the server's event loop.

Invariant: each change has a resourceVersion of its own, and the log says what led from any version
after `floor` to now.
"""

import asyncio
import base64
import copy
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.support.kube.failure import Failure
from tests.support.kube.kinds import Kind

Object = dict[str, Any]
Key = tuple[str, str, str]
"""Resource, namespace, name."""
_NAME = re.compile(r"[a-z0-9:]([-a-z0-9.:]{0,251}[a-z0-9:])?")


@dataclass(frozen=True)
class Change:
    """One entry of the log; `before` or `after` is None where there was or is nothing."""

    version: int
    key: Key
    before: Object | None
    after: Object | None


class Subscription:
    """Changes that one watch has not seen yet."""

    def __init__(self, pending: list[Change]) -> None:
        self.pending = pending
        self.woken = asyncio.Event()


class Store:
    """See the module."""

    def __init__(self) -> None:
        self.version = 1
        self.floor = 1
        self._objects: dict[Key, Object] = {}
        self._log: list[Change] = []
        self._watchers: set[Subscription] = set()

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """A copy of an object; Failure 404 if there is none."""
        found = self._objects.get((kind.resource, namespace, name))
        if found is None:
            raise Failure(404, f'{kind.resource} "{name}" not found', name=name, kind=kind.plural)
        return copy.deepcopy(found)

    def find(self, kind: Kind, namespace: str | None) -> Iterator[Object]:
        """Objects of a kind by name; of all namespaces if None."""
        for key in sorted(self._objects):
            if key[0] == kind.resource and namespace in (None, key[1]):
                yield self._objects[key]

    def changes(self, after: int) -> list[Change]:
        """What happened after a version; Failure 410 if that is compacted."""
        if after < self.floor - 1:
            raise Failure(410, f"too old resource version: {after} ({self.floor})")
        return [change for change in self._log if change.version > after]

    def compact(self) -> None:
        """Forget the log: a watch can begin only at what is now."""
        self._log.clear()
        self.version += 1
        self.floor = self.version + 1

    def restore(self) -> None:
        """Be a server restored from a backup: the same objects, and versions start anew."""
        self._log.clear()
        self.version = self.floor = 1

    def subscribe(self, after: int) -> "Subscription":
        """Every change after a version; give it back with `leave`. Failure 410 as `changes`."""
        subscription = Subscription(self.changes(after))
        self._watchers.add(subscription)
        return subscription

    def leave(self, subscription: "Subscription") -> None:
        self._watchers.discard(subscription)

    def create(self, kind: Kind, namespace: str, item: Object) -> Object:
        """Add an object and return it as it is then."""
        item = _own(kind, namespace, item)
        metadata = item["metadata"]
        if not metadata.get("name") and (prefix := metadata.get("generateName")):
            metadata["name"] = prefix + secrets.token_hex(3)[:5]
        name = metadata.get("name") or ""
        if not _NAME.fullmatch(name):
            raise Failure(422, f'{kind.kind} "{name}" is invalid: metadata.name', name=name)
        if kind.namespaced and ("namespaces", "", namespace) not in self._objects:
            raise Failure(404, f'namespaces "{namespace}" not found', name=namespace)
        key = (kind.resource, namespace, name)
        if key in self._objects:
            raise Failure(
                409, f'{kind.resource} "{name}" already exists', reason="AlreadyExists", name=name
            )
        metadata["uid"] = str(uuid.uuid4())
        metadata["creationTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        metadata["generation"] = 1
        if kind.kind == "Namespace":
            item.setdefault("status", {})["phase"] = "Active"
        return self._put(key, None, item)

    def replace(self, kind: Kind, namespace: str, item: Object, part: str = "") -> Object:
        """Write an object over the one of its name, or only its `status`, and return it.

        Raises:
            Failure: 404; 409 if it carries another resourceVersion or uid than what is there.
        """
        item = _own(kind, namespace, item)
        name = item["metadata"].get("name", "")
        key = (kind.resource, namespace, name)
        before = self.get(kind, namespace, name)
        for field in ("resourceVersion", "uid"):
            wanted = item["metadata"].get(field)
            if wanted and wanted != before["metadata"][field]:
                raise Failure(
                    409,
                    f'Operation cannot be fulfilled on {kind.resource} "{name}": the object has '
                    "been modified; please apply your changes to the latest version and try again",
                    reason="Conflict",
                    name=name,
                )
        if part == "status":
            status, metadata = item.get("status"), item["metadata"]
            item = {**copy.deepcopy(before), "status": status}
            item["metadata"]["managedFields"] = metadata.get("managedFields", [])
        elif "status" in before:
            item["status"] = before["status"]
        else:
            item.pop("status", None)
        for field in ("uid", "creationTimestamp", "generation", "deletionTimestamp"):
            if field in before["metadata"]:
                item["metadata"][field] = before["metadata"][field]
        item["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
        if _significant(item) == _significant(before):
            return before
        if item.get("spec") != before.get("spec"):
            item["metadata"]["generation"] += 1
        if "deletionTimestamp" in item["metadata"] and not item["metadata"].get("finalizers"):
            return self._remove(key, before)
        return self._put(key, before, item)

    def delete(self, kind: Kind, namespace: str, name: str) -> Object:
        """Take an object out, or let it wait for its finalizers; returns it as it was last."""
        key = (kind.resource, namespace, name)
        before = self.get(kind, namespace, name)
        if before["metadata"].get("finalizers"):
            if "deletionTimestamp" in before["metadata"]:
                return before
            item = copy.deepcopy(before)
            item["metadata"]["deletionTimestamp"] = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return self._put(key, before, item)
        if kind.kind == "Namespace":
            for inside in [each for each in self._objects if each[1] == name]:
                self._remove(inside, self._objects[inside])
        return self._remove(key, before)

    def _remove(self, key: Key, before: Object) -> Object:
        del self._objects[key]
        self.version += 1
        last = copy.deepcopy(before)
        last["metadata"]["resourceVersion"] = str(self.version)
        self._note(Change(self.version, key, last, None))
        return last

    def _put(self, key: Key, before: Object | None, item: Object) -> Object:
        if item["kind"] == "Secret" and (plain := item.pop("stringData", None)):
            encoded = {k: base64.b64encode(v.encode()).decode() for k, v in plain.items()}
            item["data"] = {**(item.get("data") or {}), **encoded}
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self._objects[key] = item
        self._note(Change(self.version, key, before, item))
        return copy.deepcopy(item)

    def _note(self, change: Change) -> None:
        self._log.append(change)
        for subscription in self._watchers:
            subscription.pending.append(change)
            subscription.woken.set()


def event_of(change: Change, wanted: Callable[[Object], bool]) -> tuple[str, Object] | None:
    """What a watch with a selector shows of a change."""
    was = change.before is not None and wanted(change.before)
    if change.after is not None and wanted(change.after):
        return ("MODIFIED" if was else "ADDED"), change.after
    if not was:
        return None
    assert change.before is not None
    gone = copy.deepcopy(change.before)
    gone["metadata"]["resourceVersion"] = str(change.version)
    return "DELETED", gone


def _own(kind: Kind, namespace: str, item: Object) -> Object:
    item = copy.deepcopy(item)
    said = (item.setdefault("apiVersion", kind.group_version), item.setdefault("kind", kind.kind))
    if said != (kind.group_version, kind.kind):
        raise Failure(400, f"{said[1]} in {said[0]} is no {kind.kind} in {kind.group_version}")
    metadata = item.setdefault("metadata", {})
    if kind.namespaced and metadata.setdefault("namespace", namespace) != namespace:
        raise Failure(
            400, "the namespace of the object does not match the namespace on the request"
        )
    return item


def _significant(item: Object) -> Object:
    return {**item, "metadata": {**item["metadata"], "managedFields": None}}
