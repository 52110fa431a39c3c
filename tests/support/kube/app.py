"""The server's HTTP side: from a request to the store and back. One ASGI application."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from tests.support.kube import kinds, rights
from tests.support.kube.apply import applied, updated
from tests.support.kube.failure import Failure
from tests.support.kube.kinds import Kind
from tests.support.kube.patches import json_patch, merge, strategic
from tests.support.kube.request import Request, flag, read_document
from tests.support.kube.rights import ADMIN, Action, Subject
from tests.support.kube.store import Object, Store
from tests.support.kube.watching import Watch

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
REVIEWS = "apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
VERSION = {"major": "1", "minor": "35", "gitVersion": "v1.35.0", "platform": "linux/amd64"}
VERSION |= {"gitCommit": "", "gitTreeState": "clean", "buildDate": "", "goVersion": "go1.25"}
VERSION |= {"compiler": "gc"}


class KubeApp:
    """See the module. Fields say how it misbehaves; change them on its event loop."""

    def __init__(self, served: Iterable[Kind]) -> None:
        self.store = Store()
        self.served = tuple(served)
        self.subjects = {ADMIN: Subject(ADMIN)}
        self.requests: list[tuple[str, str]] = []
        """Verb and resource of each request so far."""
        self.refuse: Callable[[str, str], Failure | None] = lambda verb, resource: None
        """A failure to answer a verb on a resource with."""
        self.watches: set[Watch] = set()
        self._pages: dict[str, tuple[int, list[Object]]] = {}

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        query = {k: v[-1] for k, v in parse_qs(scope["query_string"].decode()).items()}
        try:
            answer = await self._answer(scope, headers, query, body, receive, send)
        except Failure as failure:
            await _send_json(send, failure.code, failure.status())
        else:
            if answer is not None:
                await _send_json(send, *answer)

    async def _answer(
        self,
        scope: dict[str, Any],
        headers: dict[str, str],
        query: dict[str, str],
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> tuple[int, object] | None:
        subject = self._subject(headers)
        path = scope["path"].strip("/")
        if (document := self._document(path)) is not None:
            return 200, document
        content_type = headers.get("content-type", "")
        if path == REVIEWS:
            return 201, self._review(subject, read_document(body, content_type))
        kind, namespace, name, part = self._place(path)
        request = Request(
            method=scope["method"],
            kind=kind,
            namespace=namespace,
            name=name,
            part=part,
            query=query,
            content_type=content_type,
            agent=headers.get("user-agent", ""),
            body=body,
        )
        self.requests.append((request.verb, kind.plural))
        rights.check(self.store, subject, Action(request.verb, kind, namespace, name, part))
        if (failure := self.refuse(request.verb, kind.plural)) is not None:
            raise failure
        if request.verb == "watch":
            await self._watch(request, receive, send)
            return None
        return self._do(request)

    async def _watch(self, request: Request, receive: Receive, send: Send) -> None:
        """What is gone is told within the stream, as the API server's watch cache does."""
        namespace = request.namespace if request.namespace else None
        try:
            watch = Watch(self.store, request.kind, namespace, request.wanted, request.query)
        except Failure as failure:
            await _send_json(send, 200, {"type": "ERROR", "object": failure.status()})
            return
        self.watches.add(watch)
        try:
            await watch.run(receive, send)
        finally:
            self.watches.discard(watch)

    def _subject(self, headers: dict[str, str]) -> Subject:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        subject = self.subjects.get(token.strip())
        if scheme.lower() != "bearer" or subject is None:
            raise Failure(401, "Unauthorized")
        return subject

    def _document(self, path: str) -> object:
        match path.split("/"):
            case ["version"]:
                return VERSION
            case ["api"]:
                return kinds.versions()
            case ["apis"]:
                return kinds.groups(self.served)
            case ["api", _] | ["apis", _, _]:
                found = kinds.resources(self.served, path)
                if found is None:
                    raise Failure(404, "the server could not find the requested resource")
                return found
            case ["openapi", "v3"]:
                return kinds.openapi_paths(self.served)
            case ["openapi", "v3", *root]:
                return kinds.openapi(self.served, "/".join(root))
        return None

    def _review(self, subject: Subject, review: Object) -> Object:
        """What `kubectl auth can-i` asks."""
        asked = review["spec"].get("resourceAttributes", {})
        kind = next((k for k in self.served if k.plural == asked.get("resource")), self.served[0])
        namespace, name = asked.get("namespace", ""), asked.get("name", "")
        action = Action(asked.get("verb", ""), kind, namespace, name, asked.get("subresource", ""))
        try:
            rights.check(self.store, subject, action)
        except Failure as failure:
            return {**review, "status": {"allowed": False, "reason": str(failure)}}
        return {**review, "status": {"allowed": True}}

    def _place(self, path: str) -> tuple[Kind, str, str, str]:
        """Kind, namespace, name and subresource of a path."""
        for kind in self.served:
            if not path.startswith(f"{kind.root}/"):
                continue
            rest = path.removeprefix(f"{kind.root}/").split("/")
            namespace = ""
            if kind.namespaced and rest[0] == "namespaces" and len(rest) > 2:
                namespace, rest = rest[1], rest[2:]
            if rest[0] == kind.plural and len(rest) <= 3:
                name, part = (*rest[1:], "", "")[:2]
                if part in ("", "status") or (part == "scale" and kind.scale):
                    return kind, namespace, name, part
        raise Failure(404, "the server could not find the requested resource")

    def _do(self, request: Request) -> tuple[int, object]:
        kind, namespace, name = request.kind, request.namespace, request.name
        match request.verb:
            case "list":
                return 200, self._list(request)
            case "get":
                item = self.store.get(kind, namespace, name)
                return 200, _scale(item) if request.part == "scale" else item
            case "create":
                item = request.document()
                item.setdefault("apiVersion", kind.group_version)
                item.setdefault("kind", kind.kind)
                item.setdefault("metadata", {})
                updated(None, item, request.manager)
                return 201, item if request.dry else self.store.create(kind, namespace, item)
            case "update":
                return 200, self._write(request, request.document())
            case "patch":
                return self._patch(request)
            case "delete":
                item = self.store.get(kind, namespace, name)
                _check_preconditions(request, item)
                return 200, item if request.dry else self.store.delete(kind, namespace, name)
            case "deletecollection":
                gone = self._selected(request)
                for item in gone:
                    metadata = item["metadata"]
                    self.store.delete(kind, metadata.get("namespace", ""), metadata["name"])
                return 200, _listing(kind, gone, self.store.version)
        raise Failure(405, f"{request.method} is not done here")

    def _selected(self, request: Request) -> list[Object]:
        wanted = request.wanted
        namespace = request.namespace if request.namespace else None
        return [item for item in self.store.find(request.kind, namespace) if wanted(item)]

    def _list(self, request: Request) -> Object:
        """Pages of one list are of one moment, as long as it was not compacted."""
        limit = int(request.query.get("limit", 0))
        if token := request.query.get("continue"):
            version, items = self._pages.pop(token, (0, []))
            if version < self.store.floor - 1:
                raise Failure(410, "The provided continue parameter is too old")
        else:
            version, items = self.store.version, self._selected(request)
        listing = _listing(request.kind, items[: limit or None], version)
        if limit and len(items) > limit:
            rest = secrets.token_hex(8)
            self._pages[rest] = (version, items[limit:])
            listing["metadata"] |= {"continue": rest, "remainingItemCount": len(items) - limit}
        return listing

    def _patch(self, request: Request) -> tuple[int, object]:
        kind, namespace, name = request.kind, request.namespace, request.name
        patch = request.document()
        if "apply-patch" in request.content_type:
            return self._apply(request, patch)
        live = self.store.get(kind, namespace, name)
        shown = _scale(live) if request.part == "scale" else live
        if "json-patch" in request.content_type:
            item = json_patch(shown, patch)
        elif "strategic-merge-patch" in request.content_type:
            item = strategic(shown, patch)
        elif "merge-patch" in request.content_type:
            item = merge(shown, patch)
        else:
            raise Failure(415, f"{request.content_type} is no patch")
        return 200, self._write(request, item)

    def _apply(self, request: Request, wanted: Object) -> tuple[int, object]:
        kind, namespace, name = request.kind, request.namespace, request.name
        wanted["metadata"].setdefault("name", name)
        force = flag(request.query, "force")
        try:
            live = self.store.get(kind, namespace, name)
        except Failure:
            metadata = {"name": name, **({"namespace": namespace} if kind.namespaced else {})}
            blank = {"apiVersion": kind.group_version, "kind": kind.kind, "metadata": metadata}
            item = applied(blank, wanted, request.manager, force=force)
            return 201, item if request.dry else self.store.create(kind, namespace, item)
        item = applied(live, wanted, request.manager, force=force)
        item["metadata"]["resourceVersion"] = wanted["metadata"].get("resourceVersion", "")
        if request.dry:
            return 200, item
        return 200, self.store.replace(kind, namespace, item, request.part)

    def _write(self, request: Request, item: Object) -> Object:
        kind, namespace, part = request.kind, request.namespace, request.part
        before = self.store.get(kind, namespace, request.name)
        if part == "scale":
            replicas = item["spec"].get("replicas", 0)
            scaled = {**before, "spec": {**before["spec"], "replicas": replicas}}
            version = item["metadata"].get("resourceVersion", "")
            item = {**scaled, "metadata": {**before["metadata"], "resourceVersion": version}}
        item.setdefault("kind", kind.kind)
        item.setdefault("apiVersion", kind.group_version)
        item["metadata"].setdefault("managedFields", before["metadata"].get("managedFields", []))
        updated(before, item, request.manager)
        if request.dry:
            return item
        written = self.store.replace(kind, namespace, item, "" if part == "scale" else part)
        return _scale(written) if part == "scale" else written


def _listing(kind: Kind, items: list[Object], version: int) -> Object:
    bare = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
    return {
        "kind": f"{kind.kind}List",
        "apiVersion": kind.group_version,
        "metadata": {"resourceVersion": str(version)},
        "items": bare,
    }


def _scale(item: Object) -> Object:
    metadata = item["metadata"]
    named = {key: metadata[key] for key in ("name", "namespace", "uid", "resourceVersion")}
    selector = item["spec"].get("selector") or {}
    labels = ",".join(f"{k}={v}" for k, v in (selector.get("matchLabels") or {}).items())
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": named,
        "spec": {"replicas": item["spec"].get("replicas", 1)},
        "status": {"replicas": item.get("status", {}).get("replicas", 0), "selector": labels},
    }


def _check_preconditions(request: Request, item: Object) -> None:
    options = request.document() if request.body else {}
    for field, value in (options.get("preconditions") or {}).items():
        if item["metadata"][field] != value:
            raise Failure(409, f"the {field} in the precondition does not match", reason="Conflict")


async def _send_json(send: Send, code: int, document: object) -> None:
    body = json.dumps(document).encode() + b"\n"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    with contextlib.suppress(OSError, asyncio.CancelledError):
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": body})
