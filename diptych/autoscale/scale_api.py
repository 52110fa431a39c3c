"""The scale subresource of what runs a pool, through the `kubernetes` client.

Used by the loop, in a thread, since the client is synchronous. Asks for two verbs: get and patch on
the scale subresource. A patch names the version that was read, so that whoever else scales at the
same time is not overruled.
"""

import re
from dataclasses import dataclass
from typing import Any

from core.errors import UnavailableError
from router.fleet.kubernetes.connection import connect

TIMEOUT_S = (5.0, 15.0)
"""To connect, and to answer."""
GROUPS = {
    "deployment": ("apps", "v1", "deployments"),
    "statefulset": ("apps", "v1", "statefulsets"),
    "leaderworkerset": ("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One object that has replicas."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `kind/name`.

        Raises:
            ValueError: it is none, or of a kind that has no replicas.
        """
        kind, _, name = text.partition("/")
        if kind.lower() not in GROUPS or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
            raise ValueError(f"`{text}` is not kind/name with a kind of {', '.join(GROUPS)}")
        return cls(kind=kind.lower(), name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What was read of a target."""

    replicas: int
    version: str
    """Of the object; a patch that names another is refused."""


class ScaleApi:
    """Reads and sets replicas in one namespace."""

    def __init__(self, namespace: str | None) -> None:
        """Find the API server.

        Args:
            namespace: of the targets; None: the pod's own, or that of the kubeconfig's context.

        Raises:
            ConfigError: the client is not installed, or nothing says where the API server is.
        """
        found = connect(namespace, "diptych autoscale")
        self.namespace = found.namespace
        self._errors, self._network_errors = found.refused, found.unreachable
        self._host = found.host
        self._client = found.client.CustomObjectsApi(found.api_client)

    def read(self, target: Target) -> Scale:
        """Replicas that the target is asked to have.

        Raises:
            UnavailableError: the API server can't be reached or refuses; the message says why.
        """
        group, version, plural = GROUPS[target.kind]
        found = self._call(
            "get", target, self._client.get_namespaced_custom_object_scale,
            group, version, self.namespace, plural, target.name,
        )  # fmt: skip
        # A scale without replicas has none: the API server leaves zeros out.
        return Scale(
            replicas=int(found["spec"].get("replicas", 0)),
            version=str(found["metadata"]["resourceVersion"]),
        )

    def write(self, target: Target, replicas: int, version: str) -> None:
        """Ask for replicas.

        Raises:
            UnavailableError: as `read`, or the object has changed since `version`.
        """
        group, api, plural = GROUPS[target.kind]
        body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        self._call(
            "patch", target, self._client.patch_namespaced_custom_object_scale,
            group, api, self.namespace, plural, target.name, body,
        )  # fmt: skip

    def _call(self, verb: str, target: Target, call: Any, *arguments: object) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = call(*arguments, _request_timeout=TIMEOUT_S)
            return answer
        except self._errors as error:
            hint = ""
            if error.status == 403:
                group, _, plural = GROUPS[target.kind]
                hint = (
                    f" Give the service account a Role in {self.namespace} with the verb {verb!r} "
                    f"on {plural}/scale of {group}."
                )
            raise UnavailableError(
                f"May not {verb} the scale of {target} in {self.namespace}: the API server "
                f"answered {error.status} {error.reason}.{hint}"
            ) from None
        except self._network_errors as error:
            raise UnavailableError(
                f"The API server at {self._host} can't be reached: {error}."
            ) from None
