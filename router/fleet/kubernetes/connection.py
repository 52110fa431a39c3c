"""Finds the API server and who we are to it, through the `kubernetes` client.

The only file that imports the client, and only when a connection is made: it is an extra. Used by
discovery and by the autoscaler.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """What calls to the API server need. The client is synchronous and tries nothing again."""

    namespace: str
    host: str
    client: Any
    """The package `kubernetes.client`, which has a class per API."""
    api_client: Any
    """What those classes are made with."""
    refused: Any
    """Exception if the server's answer is an error, with its `status`, `reason` and `body`."""
    unreachable: tuple[type[Exception], ...]
    """There is none."""


def connect(namespace: str | None, purpose: str) -> Connection:
    """Find the API server by the service account of this pod, or by a kubeconfig.

    Args:
        namespace: None: the pod's own, or that of the kubeconfig's context.
        purpose: who asks, as the beginning of a message.

    Raises:
        ConfigError: the client is not installed, or nothing says where the API server is.
    """
    try:
        import kubernetes
        import urllib3
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{purpose} needs the Python package {error.name!r}: pip install 'diptych[router,k8s]'."
        ) from None
    configuration = kubernetes.client.Configuration()
    # Our own backoff decides; the client would try again at once, three times.
    configuration.retries = False
    try:
        namespace = namespace or _own_namespace(kubernetes.config)
        if _in_cluster():
            kubernetes.config.load_incluster_config(configuration)
        else:
            kubernetes.config.load_kube_config(
                config_file=_kubeconfig(), client_configuration=configuration
            )
    except kubernetes.config.ConfigException as error:
        raise ConfigError(
            f"{purpose} finds no API server: {error} In a pod it needs the service account's token "
            "mounted (automountServiceAccountToken: true); elsewhere KUBECONFIG."
        ) from None
    return Connection(
        namespace=namespace,
        host=configuration.host,
        client=kubernetes.client,
        api_client=kubernetes.client.ApiClient(configuration),
        refused=kubernetes.client.exceptions.ApiException,
        unreachable=(urllib3.exceptions.HTTPError, OSError),
    )


def _in_cluster() -> bool:
    """A kubeconfig that is named wins, as with kubectl."""
    return not os.environ.get("KUBECONFIG") and bool(os.environ.get("KUBERNETES_SERVICE_HOST"))


def _kubeconfig() -> str:
    return os.environ.get("KUBECONFIG") or "~/.kube/config"


def _own_namespace(config: Any) -> str:
    if _in_cluster():
        try:
            return NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        except OSError:
            raise config.ConfigException(
                f"{NAMESPACE_FILE} can't be read; name the namespace."
            ) from None
    _, context = config.list_kube_config_contexts(_kubeconfig())
    return str(context["context"].get("namespace") or "default")
