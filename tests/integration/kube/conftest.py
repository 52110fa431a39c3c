"""The API server that real clients are tried on."""

from collections.abc import Iterator

import pytest

from scripts.fetch_kubernetes_tools import LATEST, KubernetesTools, ToolsUnavailable, fetch
from tests.support.kube.server import KubeServer, kube_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeServer]:
    with kube_server(tmp_path_factory.mktemp("kube")) as running:
        yield running


@pytest.fixture(scope="session")
def tools(request: pytest.FixtureRequest) -> KubernetesTools:
    """The latest ones, or those of the release that a test names."""
    try:
        return fetch(getattr(request, "param", LATEST))
    except ToolsUnavailable as reason:
        pytest.skip(str(reason))
