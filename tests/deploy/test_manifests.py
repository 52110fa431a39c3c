"""Every object that the chart can make: valid for Kubernetes, restricted, free of secrets, pinned.

Each rule is held by every profile and by every set of values below.
"""

import base64
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import yaml

from scripts.build_chart import CHART, PROFILES, ROOT
from scripts.fetch_kubernetes_tools import LATEST, OLDEST
from tests.support.helm import KUBE, Manifest, Rendering, render, run_helm

TOKEN = "correct-horse-battery"
GOLDEN_KEYS = {"router": {"apiKeys": {"existingSecret": "keys", "plainKeySecret": "plain"}}}
SELF_SIGNED = {"grpc": {"tls": {"enabled": True}, "auth": {"token": TOKEN}}}
EVERYTHING: Manifest = {
    "commonLabels": {"team": "llm"},
    "imagePullSecrets": [{"name": "registry"}],
    "image": {"registry": "registry.example/team/"},
    "model": {
        "source": "huggingface",
        "servedName": "qwen",
        "huggingface": {
            "repo": "Qwen/Qwen3-0.6B",
            "revision": "1234567",
            "existingSecret": "hf",
            "sizeLimit": "20Gi",
            "extraEnv": [{"name": "HF_ENDPOINT", "value": "https://mirror.example"}],
        },
    },
    "grpc": {"tls": {"enabled": True, "existingSecret": "workers-tls"}, "auth": {"token": TOKEN}},
    "router": {
        "image": {"digest": "sha256:" + "0" * 64},
        "config": {"max_in_flight": 1000000, "no_worker_grace_s": "20s", "tool_parser": "hermes"},
        "extraArgs": ["--log-level=debug"],
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "podAnnotations": {"note": "x"},
        "podLabels": {"tier": "front"},
        "nodeSelector": {"pool": "cpu"},
        "tolerations": [{"key": "cpu", "operator": "Exists"}],
        "priorityClassName": "high",
        "terminationGracePeriodSeconds": 600,
        "service": {"type": "LoadBalancer", "annotations": {"cloud": "internal"}},
        "ingress": {
            "enabled": True,
            "className": "nginx",
            "hosts": [{"host": "llm.example.com", "paths": ["/v1", "/console"]}],
            "tls": [{"hosts": ["llm.example.com"], "secretName": "tls"}],
        },
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["a.b"]},
        "tls": {"enabled": True, "certManager": {"enabled": True, "issuerRef": {"name": "ca"}}},
        "apiKeys": {"enabled": True, "existingSecret": "keys", "plainKeySecret": "plain"},
        "autoscaling": {"enabled": True},
    },
    "pools": {
        "prefill": {
            "role": "prefill",
            "autoscaling": {"enabled": True, "kind": "keda"},
            "model": {"huggingface": {"existingClaim": "weights"}},
        },
        "long-prompts": {"role": "prefill", "nodes": 2, "gpus": 8, "groupAnnotations": {"a": "b"}},
        "decode": {
            "role": "decode",
            "gpus": 2,
            "rdma": {"enabled": True, "runAsRoot": True},
            "runtimeClassName": "nvidia",
            "schedulerName": "other",
            "autoscaling": {"enabled": True, "kind": "keda", "targetItlSeconds": 0.05},
            "cacheClaim": "kernels",
            "topologySpreadConstraints": [
                {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
            ],
            "affinity": {"nodeAffinity": {}},
            "extraVolumes": [{"name": "more", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
            "preStopSeconds": 3,
        },
    },
    "sameZone": {"mode": "required"},
    "networkPolicy": {"httpFrom": [{"podSelector": {}}]},
    "metrics": {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True, "annotations": {"grafana_folder": "Diptych"}},
    },
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "extra"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: '{{ .Release.Name }}-more'}",
    ],
}
NOTHING: Manifest = {
    "serviceAccount": {"create": False},
    "rbac": {"create": False},
    "networkPolicy": {"enabled": False},
    "tests": {"enabled": False},
    "grpc": {"auth": {"existingSecret": "token", "secretKey": "value"}},
    "router": {
        "config": {"discovery": "static", "decode": ["10.0.0.1:9001"]},
        "podDisruptionBudget": {"enabled": False},
        "preStopSeconds": 0,
    },
    "pools": {"prefill": None, "decode": {"role": "decode"}},
    "poolDefaults": {"podDisruptionBudget": {"enabled": False}, "shmSize": ""},
    "podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None},
}
IMAGE_VOLUME: Manifest = {
    "model": {"source": "image", "image": {"reference": "r.example/m:1", "path": "/m/model.gguf"}}
}
CONTROLLER: Manifest = {
    "pools": {
        "prefill": {"role": "prefill", "autoscaling": {"enabled": True, "kind": "controller"}},
        "decode": {
            "role": "decode",
            "nodes": 2,
            "autoscaling": {"enabled": True, "kind": "controller"},
        },
    }
}
CASES: dict[str, tuple[str | None, Manifest]] = {
    **{profile: (profile, GOLDEN_KEYS) for profile in PROFILES},
    "defaults": (None, {}),
    "self-signed": (None, SELF_SIGNED | {"router": {"apiKeys": {"enabled": True}}}),
    "everything": (None, EVERYTHING),
    "nothing": (None, NOTHING),
    "image-volume": (None, IMAGE_VOLUME),
    "controller": (None, CONTROLLER),
    "names-like-numbers": (None, {"fullnameOverride": "d", "commonLabels": {"build": "12345"}}),
}


KUBERNETES = ("1.27", "1.30", "1.37")
"""Beside KUBE: the oldest that the chart allows, the first with sleep as a hook, the newest."""


@pytest.fixture(scope="module", params=CASES)
def rendering(request: pytest.FixtureRequest) -> Rendering:
    profile, values = CASES[request.param]
    return render(values, profile=profile)


def containers(rendering: Rendering) -> Iterator[tuple[str, Manifest, Manifest]]:
    for name, pod in rendering.pods():
        for each in [*pod.get("initContainers", []), *pod["containers"]]:
            yield f"{name}/{each['name']}", pod, each


CUSTOM = {
    "LeaderWorkerSet": ("leaderworkerset.x-k8s.io/v1", "leaderWorkerTemplate startupPolicy"),
    "HTTPRoute": ("gateway.networking.k8s.io/v1", "parentRefs rules"),
    "ScaledObject": ("keda.sh/v1alpha1", "scaleTargetRef minReplicaCount maxReplicaCount triggers"),
    "Certificate": ("cert-manager.io/v1", "secretName dnsNames issuerRef"),
    "PodMonitor": ("monitoring.coreos.com/v1", "selector podMetricsEndpoints"),
    "PrometheusRule": ("monitoring.coreos.com/v1", "groups"),
}
"""Kinds of others: apiVersion and what their spec can't be without."""


def test_objects_are_valid(rendering: Rendering) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendering.manifests]
    assert len(names) == len(set(names))
    for each in rendering.manifests:
        if each["kind"] in CUSTOM:
            version, needed = CUSTOM[each["kind"]]
            assert each["apiVersion"] == version
            assert set(needed.split()) <= set(each["spec"]), each["metadata"]["name"]
        else:
            kubernetes_validate.validate(each, KUBE, strict=True)
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", each["metadata"]["name"])
        assert "namespace" not in each["metadata"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid_for_other_versions(version: str) -> None:
    for each in render(EVERYTHING, kube=f"{version}.0").manifests:
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


def test_pods_of_a_group_are_valid(rendering: Rendering) -> None:
    """Templates within custom kinds, which their own schemas would check."""
    for name, pod in rendering.pods():
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod},
            KUBE,
            strict=True,
        )
        mounted = (
            {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
            if ("volumes" in pod)
            else set()
        )
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}, name


def test_containers_are_restricted(rendering: Rendering) -> None:
    """What Kubernetes' Pod Security Standard `restricted` asks for, but for RDMA as told."""
    for name, pod, each in containers(rendering):
        security = pod["securityContext"] | each["securityContext"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["capabilities"]["drop"] == ["ALL"], name
        rdma = any(key.startswith("rdma/") for key in each["resources"].get("limits", {}))
        assert ("IPC_LOCK" in security["capabilities"].get("add", [])) == rdma, name
        assert security["runAsNonRoot"] is True or (rdma and security["runAsUser"] == 0), name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        assert not any("hostPath" in volume for volume in pod.get("volumes", [])), name
        writable = {
            mount["mountPath"]
            for mount in each.get("volumeMounts", [])
            if not mount.get("readOnly")
        }
        assert writable <= {"/cache", "/tmp", "/dev/shm", "/models", "/more"}, name
        if "/models" in writable:
            assert each["name"] == "download-model"


def test_images_are_pinned(rendering: Rendering) -> None:
    version = yaml.safe_load((ROOT / CHART / "Chart.yaml").read_text())["appVersion"]
    for name, _, each in containers(rendering):
        assert re.search(rf":{re.escape(version)}$|@sha256:[0-9a-f]{{64}}$", each["image"]), name


def test_no_secret_is_outside_of_secrets(rendering: Rendering) -> None:
    secrets = {TOKEN}
    for each in rendering.of("Secret"):
        for value in each.get("data", {}).values():
            secrets |= {value, base64.b64decode(value).decode()}
        secrets |= {v for k, v in each.get("stringData", {}).items() if k == "key"}
    for each in rendering.manifests:
        if each["kind"] != "Secret":
            text = yaml.safe_dump(each)
            assert not [secret for secret in secrets if secret in text], each["metadata"]["name"]


WATCH_ENDPOINTS = {
    "apiGroups": ["discovery.k8s.io"],
    "resources": ["endpointslices"],
    "verbs": ["get", "list", "watch"],
}


def test_accounts_can_do_the_least(rendering: Rendering) -> None:
    """Routers watch endpoints; the autoscaler scales its pools, by name; workers nothing."""
    workloads = {each["metadata"]["name"]: each["kind"].lower() for each in rendering.manifests}
    for role in rendering.of("Role"):
        for rule in role["rules"]:
            if role["metadata"]["name"].endswith("-router"):
                assert rule == WATCH_ENDPOINTS
            else:
                (name,) = rule["resourceNames"]
                assert rule["verbs"] == ["get", "patch"]
                assert rule["resources"] == [f"{workloads[name]}s/scale"]
    assert not rendering.of("ClusterRole")
    for name, pod in rendering.pods():
        has_rights = pod["automountServiceAccountToken"]
        assert not has_rights or name.endswith(("-router", "-autoscaler")), name
        assert pod["enableServiceLinks"] is False, name


def test_selectors_find_their_pods(rendering: Rendering) -> None:
    """Each Service, budget and Deployment selects the pods of exactly one workload."""
    pods: dict[str, Manifest] = {}
    for each in [*rendering.of("Deployment"), *rendering.of("LeaderWorkerSet")]:
        spec: Any = each["spec"]
        template = spec.get("template") or spec["leaderWorkerTemplate"]["leaderTemplate"]
        index = {} if "template" in spec else {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
        pods[each["metadata"]["name"]] = template["metadata"]["labels"] | index
    for each in [*rendering.of("Service"), *rendering.of("PodDisruptionBudget")]:
        selector = each["spec"]["selector"]
        selector = selector.get("matchLabels", selector)
        found = [name for name, labels in pods.items() if selector.items() <= labels.items()]
        assert len(found) == 1, each["metadata"]["name"]
        name = each["metadata"]["name"].replace("-diptych-routers", "-diptych-router")
        assert found[0].removesuffix("-group") == name


def test_dashboards_and_rules_arrive_as_they_are() -> None:
    on = {"enabled": True}
    rendering = render({"metrics": {"dashboards": on, "prometheusRule": on}})
    for path in (ROOT / CHART / "dashboards").glob("*.json"):
        found = rendering.one("ConfigMap", f"-dashboard-{path.stem}")
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert found["data"][path.name].rstrip() == path.read_text().rstrip()
    for path in (ROOT / CHART / "rules").glob("*.yaml"):
        found = rendering.one("PrometheusRule", f"-{path.stem}")
        assert found["spec"] == yaml.safe_load(path.read_text())


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"self-signed"}))
def test_oldest_helm_renders_the_same(name: str) -> None:
    """But for certificates, which are random."""
    profile, values = CASES[name]
    fixed = {"grpc": {"auth": {"token": TOKEN}}} | values if name != "nothing" else values

    def sorted_objects(release: str) -> list[Manifest]:
        objects = render(fixed, profile=profile, release=release).manifests
        return sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert sorted_objects(OLDEST) == sorted_objects(LATEST)


@pytest.mark.parametrize("release", [LATEST, OLDEST])
def test_lint_finds_nothing(release: str) -> None:
    for profile in PROFILES:
        file = ROOT / CHART / f"profiles/{profile}.yaml"
        done = run_helm(
            "lint", "--strict", str(ROOT / CHART), "--values", str(file), release=release
        )
        assert done.returncode == 0, done.stdout + done.stderr
