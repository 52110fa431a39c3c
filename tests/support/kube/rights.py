"""Who a token is, and what that subject may do.

ADMIN may do everything. A service account may do what the Roles say that are bound to it in this
server, so that a chart's rights are tested as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.support.kube.failure import Failure
from tests.support.kube.kinds import BUILT_IN, Kind
from tests.support.kube.store import Store

ADMIN = "admin"
_KINDS = {each.kind: each for each in BUILT_IN}


@dataclass(frozen=True)
class Subject:
    """A service account; of the administrator the namespace is empty."""

    name: str
    namespace: str = ""

    def __str__(self) -> str:
        if not self.namespace:
            return self.name
        return f"system:serviceaccount:{self.namespace}:{self.name}"


@dataclass(frozen=True)
class Action:
    """What somebody is about to do."""

    verb: str
    kind: Kind
    namespace: str
    name: str = ""
    part: str = ""

    @property
    def resource(self) -> str:
        return f"{self.kind.plural}/{self.part}" if self.part else self.kind.plural


def check(store: Store, subject: Subject, action: Action) -> None:
    """Raises Failure 403, in the words of Kubernetes, unless a role allows it."""
    if not subject.namespace or any(
        _allows(rule, action) for rule in _rules(store, subject, action)
    ):
        return
    where = f'in the namespace "{action.namespace}"' if action.namespace else "at the cluster scope"
    named = f' "{action.name}"' if action.name else ""
    raise Failure(
        403,
        f'{action.kind.resource}{named} is forbidden: User "{subject}" cannot {action.verb} '
        f'resource "{action.resource}" in API group "{action.kind.group}" {where}',
        kind=action.kind.plural,
        group=action.kind.group,
    )


def _rules(store: Store, subject: Subject, action: Action) -> Iterable[dict[str, Any]]:
    bindings = [(each, "") for each in store.find(_KINDS["ClusterRoleBinding"], None)]
    if action.namespace:
        found = store.find(_KINDS["RoleBinding"], action.namespace)
        bindings += [(each, action.namespace) for each in found]
    for binding, namespace in bindings:
        subjects = [
            (each["kind"], each.get("namespace"), each["name"])
            for each in binding.get("subjects") or []
        ]
        if ("ServiceAccount", subject.namespace, subject.name) not in subjects:
            continue
        kind = _KINDS[binding["roleRef"]["kind"]]
        role = store.get(kind, namespace if kind.namespaced else "", binding["roleRef"]["name"])
        yield from role.get("rules") or []


def _allows(rule: dict[str, Any], action: Action) -> bool:
    def has(field: str, value: str) -> bool:
        return bool({"*", value} & set(rule.get(field) or []))

    names = rule.get("resourceNames")
    return (
        has("verbs", action.verb)
        and has("apiGroups", action.kind.group)
        and has("resources", action.resource)
        and (not names or action.name in names)
    )
