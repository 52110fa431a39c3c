"""The chart through the real helm: what values render to, and what is refused with which words."""

import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.build_chart import CHART, ROOT
from scripts.fetch_kubernetes_tools import LATEST, KubernetesTools, ToolsUnavailable, fetch

Manifest = dict[str, Any]
RELEASE, NAMESPACE = "demo", "llm"
KUBE = "1.35.0"
DEADLINE_S = 60


@cache
def kubernetes_tools(release: str = LATEST) -> KubernetesTools:
    """helm and kubectl; skips the test where they can't be had."""
    try:
        return fetch(release)
    except ToolsUnavailable as unavailable:
        pytest.skip(str(unavailable))


def run_helm(*words: str, release: str = LATEST) -> "subprocess.CompletedProcess[str]":
    """Run helm with a home of its own."""
    with tempfile.TemporaryDirectory() as home:
        homes = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        return subprocess.run(
            [str(kubernetes_tools(release).helm), *words],
            env=homes | {"PATH": os.defpath, "HOME": home},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """What a release consists of."""

    manifests: Sequence[Manifest]

    def of(self, kind: str) -> Sequence[Manifest]:
        """All objects of a kind."""
        return [each for each in self.manifests if each["kind"] == kind]

    def one(self, kind: str, name: str) -> Manifest:
        """The object of a kind whose name ends so."""
        found = [each for each in self.of(kind) if each["metadata"]["name"].endswith(name)]
        assert len(found) == 1, f"{kind} {name}: {[each['metadata']['name'] for each in found]}"
        return found[0]

    def pods(self) -> Iterator[tuple[str, Manifest]]:
        """The specification of every pod, with a name for it."""
        for each in self.manifests:
            name = f"{each['kind']}/{each['metadata']['name']}"
            match each["kind"]:
                case "Pod":
                    yield name, each["spec"]
                case "Deployment":
                    yield name, each["spec"]["template"]["spec"]
                case "LeaderWorkerSet":
                    group = each["spec"]["leaderWorkerTemplate"]
                    yield f"{name}/leader", group["leaderTemplate"]["spec"]
                    yield f"{name}/follower", group["workerTemplate"]["spec"]


def _template(
    folder: Path, values: Mapping[str, Any], profile: str | None, kube: str, release: str
) -> "subprocess.CompletedProcess[str]":
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    profiles = ["--values", str(ROOT / CHART / f"profiles/{profile}.yaml")] if profile else []
    words = ["template", RELEASE, str(ROOT / CHART), "--namespace", NAMESPACE]
    return run_helm(
        *words, *profiles, "--values", str(file), "--kube-version", kube, release=release
    )


def render(
    values: Mapping[str, Any] | None = None,
    *,
    profile: str | None = None,
    kube: str = KUBE,
    release: str = LATEST,
) -> Rendering:
    """What `helm template` makes of values on top of a profile."""
    with tempfile.TemporaryDirectory() as folder:
        done = _template(Path(folder), values or {}, profile, kube, release)
    assert done.returncode == 0, done.stderr
    loaded = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    return Rendering(manifests=[each for each in loaded if each])


def refusal(values: Mapping[str, Any], *, kube: str = KUBE) -> str:
    """What helm says of values that it refuses."""
    with tempfile.TemporaryDirectory() as folder:
        done = _template(Path(folder), values, None, kube, LATEST)
    assert done.returncode != 0, "helm takes these values"
    return done.stderr


def container(spec: Manifest) -> Manifest:
    """The only container of a pod."""
    (only,) = spec["containers"]
    assert isinstance(only, dict)
    return only


def settings_of(rendering: Rendering, component: str) -> Manifest:
    """The settings that a router or a pool is given as a file."""
    config = rendering.one("ConfigMap", f"-{component}")["data"]["config.yaml"]
    loaded = yaml.safe_load(config)
    assert isinstance(loaded, dict)
    return loaded
