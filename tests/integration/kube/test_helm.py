"""The tests' API server is one that helm takes for real."""

import base64
from pathlib import Path

import pytest

from scripts.fetch_kubernetes_tools import LATEST, OLDEST, KubernetesTools
from tests.support.kube.clients import Program
from tests.support.kube.failure import Failure
from tests.support.kube.server import KubeServer

TEMPLATE = """
{{- $old := (lookup "v1" "Secret" .Release.Namespace .Release.Name).data | default dict }}
apiVersion: v1
kind: Secret
metadata: {name: "{{ .Release.Name }}"}
data: {token: {{ get $old "token" | default (randAlphaNum 16 | b64enc) }}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: "{{ .Release.Name }}"}
spec:
  replicas: {{ .Values.replicas }}
  selector: {matchLabels: {app: x}}
  template:
    metadata: {labels: {app: x}}
    spec: {containers: [{name: a, image: "x:1"}]}
{{- if .Values.extra }}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: extra}
{{- end }}
"""


@pytest.fixture
def chart(tmp_path: Path) -> str:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "all.yaml").write_text(TEMPLATE)
    (tmp_path / "Chart.yaml").write_text("{apiVersion: v2, name: small, version: 1.0.0}")
    (tmp_path / "values.yaml").write_text("{replicas: 2, extra: true}")
    return str(tmp_path)


@pytest.mark.parametrize("tools", [LATEST, OLDEST], indirect=True)
def test_install_upgrade_and_uninstall(
    server: KubeServer, tools: KubernetesTools, chart: str
) -> None:
    helm = Program(tools.helm, server.kubeconfig())
    where = ("--namespace", "apps")
    helm("install", "r", chart, *where, "--create-namespace")
    assert server.get("Namespace", "apps", "")["status"]["phase"] == "Active"
    token = server.get("Secret", "r", "apps")["data"]["token"]
    assert len(base64.b64decode(token)) == 16
    assert "name that is still in use" in helm.refusal("install", "r", chart, *where)

    helm("upgrade", "r", chart, *where, "--set", "replicas=3,extra=false")
    assert server.get("Secret", "r", "apps")["data"]["token"] == token, "lookup found nothing"
    assert server.get("Deployment", "r", "apps")["spec"]["replicas"] == 3
    with pytest.raises(Failure, match="not found"):
        server.get("ConfigMap", "extra", "apps")
    (release,) = helm.json("list", "--all-namespaces")
    assert (release["name"], release["revision"], release["status"]) == ("r", "2", "deployed")

    helm("rollback", "r", "1", *where)
    assert server.get("Deployment", "r", "apps")["spec"]["replicas"] == 2
    helm("uninstall", "r", *where)
    assert not server.find("Secret", "apps") and not server.find("Deployment", "apps")
    server.delete("Namespace", "apps", "")
    assert helm.json("list", "--all-namespaces") == []
