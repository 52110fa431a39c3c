"""The two calls to the API server that discovery makes, through the `kubernetes` client.

Used by the watch, in its thread. Every wait has a deadline.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus as Status
from typing import Any, Protocol

from router.fleet.kubernetes.connection import connect
from router.fleet.kubernetes.slices import Json
from router.fleet.kubernetes.store import GoneError

CONNECT_S = 5.0
GRACE_S = 5.0
"""Time that the server may be late in ending a watch."""
LIST_S = 15.0
"""Silence after which a list has failed."""
PAGE = 500
"""Slices per answer to a list; more come in further answers."""
MAX_LINE_BYTES = 16 << 20
"""Longest event: well above the 1.5 MiB that an object may have in etcd."""
RESOURCE = "endpointslices.discovery.k8s.io"


class ApiError(Exception):
    """The API server did not do what it was asked for; says why and, if one can, what to do."""

    def __init__(self, outcome: str, message: str, retry_after_s: float = 0.0) -> None:
        """Args: a word for metrics, a sentence for people, and the least wait before another."""
        super().__init__(message)
        self.outcome = outcome
        self.retry_after_s = retry_after_s


class Lines(Protocol):
    """A watch that is open."""

    def __iter__(self) -> Iterator[bytes]:
        """Whole lines, until the server ends the watch; raises ApiError if it breaks."""

    def shut(self) -> None:
        """End it from another thread; never raises."""

    def close(self) -> None:
        """Give the connection up."""


class SliceApi(Protocol):
    """What the watch needs of the API server."""

    def list(self) -> tuple[list[Json], str]:
        """Every slice, and the resourceVersion that they are as of.

        Raises:
            GoneError: the list took longer than the server keeps what it began with.
            ApiError: it failed.
        """

    def watch(self, version: str, timeout_s: float) -> Lines:
        """What changes after a resourceVersion, for so long.

        Raises: as `list`.
        """

    def close(self) -> None:
        """Give up every connection."""


class KubernetesApi:
    """SliceApi by a synchronous client, with the rights of this pod or of a kubeconfig."""

    def __init__(self, namespace: str | None, selector: str) -> None:
        """Find the API server.

        Args:
            namespace: where to look; None: the pod's own, or that of the kubeconfig's context.
            selector: labels that the slices have.

        Raises:
            ConfigError: the client is not installed, or nothing says where the API server is.
        """
        found = connect(namespace, "Discovery through Kubernetes")
        self.namespace = found.namespace
        self._errors, self._network_errors = found.refused, found.unreachable
        self._host = found.host
        self._selector = selector
        self._client = found.client.DiscoveryV1Api(found.api_client)

    def __str__(self) -> str:
        """What is looked at, for logs."""
        return f"{RESOURCE} with {self._selector} in namespace {self.namespace} at {self._host}"

    def list(self) -> tuple[list[Json], str]:
        """See SliceApi."""
        items: list[Json] = []
        token: str | None = None
        while True:
            options = {"_continue": token} if token else {}
            response = self._call("list", read_s=LIST_S, limit=PAGE, **options)
            try:
                answer = json.loads(response.data)
                metadata = answer["metadata"]
                items += answer.get("items") or []
                token = metadata.get("continue")
                if not token:
                    return items, str(metadata["resourceVersion"])
            except self._network_errors as error:
                raise ApiError("unreachable", f"The list broke off: {error}.") from None
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ApiError("error", f"The answer to a list is none: {error!r}.") from None
            finally:
                response.release_conn()

    def watch(self, version: str, timeout_s: float) -> Lines:
        """See SliceApi. A watch that is silent for longer than it was to last has broken."""
        response = self._call(
            "watch",
            read_s=timeout_s + GRACE_S,
            watch=True,
            allow_watch_bookmarks=True,
            resource_version=version,
            timeout_seconds=max(1, round(timeout_s)),
        )
        return _ResponseLines(response, self._network_errors)

    def close(self) -> None:
        """See SliceApi."""
        self._client.api_client.rest_client.pool_manager.clear()

    def _call(self, verb: str, *, read_s: float, **options: object) -> Any:
        try:
            return self._client.list_namespaced_endpoint_slice(
                self.namespace,
                label_selector=self._selector,
                _preload_content=False,
                _request_timeout=(CONNECT_S, read_s),
                **options,
            )
        except self._errors as error:
            raise self._refusal(verb, error) from None
        except self._network_errors as error:
            raise ApiError(
                "unreachable", f"The API server at {self._host} can't be reached: {error}."
            ) from None

    def _refusal(self, verb: str, error: Any) -> Exception:
        said = _message(error.body) or error.reason
        match error.status:
            case Status.GONE:
                return GoneError(said)
            case Status.FORBIDDEN:
                return ApiError(
                    "forbidden",
                    f"May not {verb} {RESOURCE} in namespace {self.namespace}: {said} Give the "
                    f"router's service account a Role there with the verb {verb!r} on them.",
                )
            case Status.UNAUTHORIZED:
                return ApiError("unauthorized", f"The API server does not accept the token: {said}")
            case Status.TOO_MANY_REQUESTS:
                headers = error.headers or {}
                wait = str(headers.get("Retry-After", ""))
                return ApiError("throttled", said, float(wait) if wait.isdigit() else 1.0)
            case status:
                return ApiError("error", f"The API server answered {status}: {said}")


class _ResponseLines:
    """Lines of a response whose body never ends by itself for long."""

    def __init__(self, response: Any, network_errors: tuple[type[Exception], ...]) -> None:
        self._response = response
        self._network_errors = network_errors

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        try:
            for piece in self._response.stream(amt=None, decode_content=True):
                *lines, rest = (rest + piece).split(b"\n")
                yield from (line for line in lines if line.strip())
                if len(rest) > MAX_LINE_BYTES:
                    raise ApiError("error", f"An event is longer than {MAX_LINE_BYTES} bytes.")
        except self._network_errors as error:
            raise ApiError("unreachable", f"The watch broke off: {error}.") from None

    def shut(self) -> None:
        over: tuple[type[Exception], ...] = (*self._network_errors, ValueError, RuntimeError)
        with suppress(*over):
            self._response.shutdown()

    def close(self) -> None:
        self._response.close()


def _message(body: Any) -> str:
    try:
        status = json.loads(body)
        return str(status["message"]).rstrip(".") + "."
    except (ValueError, LookupError, TypeError):
        return ""
