"""One call on a resource, and what its body says."""

import json
from dataclasses import dataclass
from typing import Any

import yaml

from tests.support.kube import protobuf, selectors
from tests.support.kube.failure import Failure
from tests.support.kube.kinds import Kind


def flag(query: dict[str, str], name: str) -> bool:
    """A parameter that is true or false, in the spellings of Go."""
    return query.get(name, "").lower() in ("1", "t", "true")


@dataclass(frozen=True)
class Request:
    """One call on a resource."""

    method: str
    kind: Kind
    namespace: str
    name: str
    part: str
    query: dict[str, str]
    content_type: str
    agent: str
    body: bytes

    @property
    def verb(self) -> str:
        """As RBAC names it."""
        match self.method:
            case "GET" if not self.name:
                return "watch" if self.watches else "list"
            case "DELETE" if not self.name:
                return "deletecollection"
        named = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch"}
        return named.get(self.method, self.method.lower())

    @property
    def watches(self) -> bool:
        return flag(self.query, "watch")

    @property
    def manager(self) -> str:
        return self.query.get("fieldManager") or self.agent.partition("/")[0] or "unknown"

    @property
    def dry(self) -> bool:
        return "dryRun" in self.query

    @property
    def wanted(self) -> selectors.Test:
        """A test of objects by the request's selectors."""
        by_label = selectors.labels(self.query.get("labelSelector", ""))
        by_field = selectors.fields(self.query.get("fieldSelector", ""))
        return lambda item: by_label(item) and by_field(item)

    def document(self) -> Any:
        """The body."""
        return read_document(self.body, self.content_type)


def read_document(body: bytes, content_type: str) -> Any:
    """What a body says in JSON, YAML or protobuf."""
    if "protobuf" in content_type:
        return protobuf.read(body)
    try:
        return yaml.safe_load(body) if "yaml" in content_type else json.loads(body)
    except (ValueError, yaml.YAMLError) as error:
        raise Failure(400, f"the body can't be read: {error}") from None
