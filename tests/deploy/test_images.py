"""The Dockerfile: what it takes in, who runs it, and that the chart and it mean the same."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts.build_chart import CHART, PROFILES
from scripts.install_image import CONSTRAINTS, CUDA_CONSTRAINTS, IMAGES, PREFIX, requirements
from scripts.lock_cuda import pinned
from tests.support.helm import container, render
from tests.support.images import DOCKERFILE, ROOT, lineage, sent_to_builders, stages, variables

SCRIPT = "/source/scripts/install_image.py"
VALUES = yaml.safe_load((ROOT / CHART / "values.yaml").read_text())


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(hadolint), "--failure-threshold", "style", str(DOCKERFILE)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bases_are_pinned_by_tag_and_digest() -> None:
    known = stages()
    outside = {stage.base for stage in known.values() if stage.base not in known}
    assert len(outside) == 1, "images that share a base share its layers"
    for base in outside:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", base), base


@pytest.mark.parametrize("image", IMAGES)
def test_image_runs_as_the_user_of_the_chart(image: str) -> None:
    final = stages()[image]
    security = VALUES["podSecurityContext"]
    user = f"{security['runAsUser']}:{security['runAsGroup']}"
    assert final.all("USER") == [user]
    assert [words for words in final.all("COPY") if words.endswith(" /cache")] == [
        f"--from=product --chown={user} /empty /cache"
    ]


@pytest.mark.parametrize("image", IMAGES)
def test_image_is_told_to_stop_as_processes_expect(image: str) -> None:
    final = stages()[image]
    assert final.last("STOPSIGNAL") == "SIGTERM"
    assert final.exec_form("ENTRYPOINT") == [["diptych"]]
    labels = " ".join(final.all("LABEL"))
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels


@pytest.mark.parametrize("image", IMAGES)
def test_image_and_chart_name_the_same_folders(image: str) -> None:
    known = variables(image)
    names = {"router": "-router", "worker-cpu": "-prefill", "worker": "-decode"}
    rendering = render(profile={"worker": "single-node"}.get(image, "cpu"))
    spec = rendering.one("Deployment", names[image])["spec"]["template"]["spec"]
    pod = container(spec)
    assert pod["image"].endswith(f"diptych/{image}:{_version()}")
    given = {each["name"]: each["value"] for each in pod["env"] if "value" in each}
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "USER"):
        assert given[name] == known[name]
    assert known.get("FLASHINFER_WORKSPACE_BASE") in (None, given.get("FLASHINFER_WORKSPACE_BASE"))
    mounted = {each["mountPath"] for each in pod["volumeMounts"] if not each.get("readOnly")}
    folders = {value for value in known.values() if re.fullmatch(r"/\w+", value)}
    assert folders <= mounted


def test_each_image_of_the_chart_is_a_stage() -> None:
    files = [ROOT / CHART / "values.yaml"]
    files += [ROOT / CHART / "profiles" / f"{name}.yaml" for name in PROFILES]
    repositories = {
        name for file in files for name in re.findall(r"repository: ([\w/-]+)", file.read_text())
    }
    assert repositories == {f"diptych/{name}" for name in IMAGES}
    assert stages().keys() >= IMAGES.keys()


def test_only_files_that_are_there_are_copied_and_nothing_is_fetched(tmp_path: Path) -> None:
    sent_to_builders(tmp_path)
    for stage in stages().values():
        assert not stage.all("ADD"), "ADD fetches and unpacks; COPY does neither"
        for words in stage.all("COPY"):
            names = [word for word in words.split() if not word.startswith("--")][:-1]
            if "--from=" not in words:
                assert all((tmp_path / name).exists() for name in names), words


def test_builders_are_sent_the_packages_and_little_else(tmp_path: Path) -> None:
    sent_to_builders(tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {
        name.removesuffix("*")
        for name in project["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    sent = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert sent == packages | {"scripts", "deploy"}


def test_every_installation_is_a_step_of_the_script() -> None:
    for stage in stages().values():
        for words in stage.exec_form("RUN"):
            assert words[:2] == ["python", SCRIPT] and words[3] in IMAGES, words
    for image in IMAGES:
        steps = [words[2] for stage in lineage(image) for words in stage.exec_form("RUN")]
        assert steps == [*(["system"] if IMAGES[image].debian else []), "check"]
        assert stages()[f"{image}-dependencies"].exec_form("RUN")[0][3] == image


def test_the_environment_and_its_interpreter_are_where_variables_say() -> None:
    (version,) = {re.sub(r".*:(\d+\.\d+)\..*", r"\1", stages()["base"].base)}
    for image in IMAGES:
        assert variables(image)["PATH"] == f"{PREFIX}/bin"
    toolkit = f"{PREFIX}/lib/python{version}/site-packages/nvidia/cu13"
    assert variables("worker")["CUDA_HOME"] == toolkit


@pytest.mark.parametrize("image", IMAGES)
def test_every_requirement_is_pinned(image: str) -> None:
    pins = pinned(CONSTRAINTS) | (pinned(CUDA_CONSTRAINTS) if IMAGES[image].cuda else {})
    names = {re.split(r"[<>=!\[;~ ]", each)[0] for each in requirements(IMAGES[image])}
    assert names | {"pip", "setuptools"} <= pins.keys()


def _version() -> str:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert isinstance(version, str)
    return version


@pytest.mark.parametrize("docker", [True, False])
def test_make_images_builds_what_the_chart_pulls(docker: bool, tmp_path: Path) -> None:
    calls = _programs(tmp_path, "docker")
    if not docker:
        (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(
        ["make", "--no-print-directory", "images", "IMAGE_REGISTRY=registry.example/team"],
        env={"PATH": f"{tmp_path}:{os.defpath}"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode == 0) is docker
    rendering = render({"image": {"registry": "registry.example/team"}})
    pulled = {holder["image"] for _, spec in rendering.pods() for holder in spec["containers"]}
    assert pulled <= set(re.findall(r"--tag (\S+)", done.stdout))
    if docker:
        builds = [line for line in calls.read_text().splitlines() if "--target" in line]
        assert [line.partition(" ")[2] for line in builds] == [
            line.partition(" ")[2] for line in done.stdout.splitlines()
        ]


def test_make_kind_loads_what_the_profile_runs(tmp_path: Path) -> None:
    calls = _programs(tmp_path, "docker", "kind", "kubectl", "helm")
    done = subprocess.run(
        [str(ROOT / "scripts" / "kind.sh"), "--set=x=y"],
        env={"PATH": f"{tmp_path}:{os.defpath}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = calls.read_text().splitlines()
    loaded = {line.split()[-1] for line in lines if line.startswith("kind load docker-image")}
    rendering = render(profile="cpu")
    assert loaded == {
        holder["image"] for _, spec in rendering.pods() for holder in spec["containers"]
    }
    (upgrade,) = (line for line in lines if line.startswith("helm upgrade"))
    assert "profiles/cpu.yaml" in upgrade and upgrade.endswith("--set=x=y")
    assert any(line.startswith("helm test") for line in lines[lines.index(upgrade) :])


def test_values_that_the_guide_shows_are_taken() -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    blocks = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL))
    shown = [block for block in blocks if "poolDefaults" in block]
    assert shown
    for values in shown:
        rendering = render(values, profile="pd-rdma")
        scaler = rendering.one("HorizontalPodAutoscaler", "-decode")
        assert (
            scaler["spec"]["minReplicas"] == values["pools"]["decode"]["autoscaling"]["minReplicas"]
        )


def _programs(folder: Path, *names: str) -> Path:
    """Stand-ins that write down how they are called; returns the file."""
    calls = folder / "calls"
    for name in names:
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\n')
        program.chmod(0o755)
    return calls
