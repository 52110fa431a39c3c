"""Which source of workers a router's settings ask for."""

from prometheus_client import CollectorRegistry

from core.clock import monotonic
from router.fleet.discovery import Discovery, StaticDiscovery
from router.fleet.kubernetes.api import KubernetesApi
from router.fleet.kubernetes.discovery import KubernetesDiscovery
from router.fleet.kubernetes.metrics import DiscoveryMetrics
from router.settings import RouterSettings


def open_discovery(settings: RouterSettings, registry: CollectorRegistry) -> Discovery:
    """The source, not running yet.

    Raises:
        ConfigError: no worker is named, or nothing says where Kubernetes is.
    """
    if settings.discovery == "static":
        return StaticDiscovery(settings.prefill, settings.decode)
    return KubernetesDiscovery(
        KubernetesApi(settings.kubernetes_namespace, settings.kubernetes_selector),
        DiscoveryMetrics(registry, monotonic),
        monotonic,
    )
