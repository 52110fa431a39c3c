"""Files, variables and words that the chart gives to processes are what the processes take."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from core.settings import load
from decode.settings import DecodeSettings
from diptych.autoscale.settings import AutoscaleSettings
from prefill.settings import PrefillSettings
from router.settings import RouterSettings
from scripts.build_chart import PROFILES, ROOT
from tests.support.helm import Manifest, Rendering, container, render

CLASSES: dict[str, Any] = {
    "router": RouterSettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
}
NODE = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "d-0.d.llm"}
"""What the controller of LeaderWorkerSets puts into pods."""
SECURED: Manifest = {
    "grpc": {"tls": {"enabled": True}},
    "router": {
        "tls": {"enabled": True, "existingSecret": "tls"},
        "apiKeys": {"enabled": True},
        "config": {"max_in_flight": 1000000, "no_worker_grace_s": "20s", "trace_ratio": 0.5},
        "extraArgs": ["--log-level", "debug"],
    },
    "pools": {
        "prefill": {"role": "prefill", "config": {"lease_ttl_s": "20s", "max_model_len": 4000000}},
        "decode": {"role": "decode", "config": {"max_inflight_bytes": "1GiB"}},
    },
}


def processes(rendering: Rendering) -> dict[str, tuple[list[str], dict[str, str], str]]:
    """Of each workload of ours: words, variables, and the file at --config."""
    files = {each["metadata"]["name"]: each.get("data", {}) for each in rendering.of("ConfigMap")}
    found = {}
    for name, pod in rendering.pods():
        if name.startswith("Pod/"):
            continue
        each = container(pod)
        (config,) = [v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v]
        env = {e["name"]: e.get("value") or _invented(e["valueFrom"]) for e in each["env"]}
        words = [
            re.sub(r"\$\((\w+)\)", lambda match: NODE[match[1]], word)
            for word in each["command"] + each["args"]
        ]
        found[name] = (words, env, files[config]["config.yaml"])
    return found


def _invented(source: Manifest) -> str:
    match source:
        case {"fieldRef": {"fieldPath": "status.podIP"}}:
            return "10.1.2.3"
        case {"resourceFieldRef": _}:
            return "2"
        case _:
            return "invented"


@pytest.mark.parametrize("case", [*PROFILES, "secured"])
def test_processes_take_their_settings(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendering = render(SECURED) if case == "secured" else render(profile=case)
    for words, env, config in processes(rendering).values():
        (tmp_path / "config.yaml").write_text(config)
        role = words[1]
        with monkeypatch.context() as patched:
            for variable, value in env.items():
                patched.setenv(variable, value)
            argv = ["--config", str(tmp_path / "config.yaml"), *words[3:]]
            settings = load(CLASSES[role], argv, prog=role, env_prefix=f"DIPTYCH_{role.upper()}_")
        assert words[2] == "--config=/etc/diptych/config.yaml"
        given = yaml.safe_load(config)
        assert set(given) <= settings.model_fields_set
        if role != "router":
            assert settings.advertise_host == "10.1.2.3"
            assert settings.worker_id == settings.node == "invented"


def test_autoscaler_takes_its_settings(tmp_path: Path) -> None:
    scaled = {"autoscaling": {"enabled": True, "kind": "controller", "targetItlSeconds": 0.04}}
    pools = {"prefill": {"role": "prefill"} | scaled, "decode": {"role": "decode"} | scaled}
    config = render({"pools": pools}).one("ConfigMap", "-autoscaler")["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(config)
    argv = ["--config", str(tmp_path / "config.yaml")]
    settings = load(AutoscaleSettings, argv, prog="autoscale", env_prefix="DIPTYCH_AUTOSCALE_")
    assert settings.itl_s == 0.04
    assert settings.prefill == "deployment/demo-diptych-prefill"


@pytest.mark.parametrize("role", CLASSES)
def test_real_command_takes_the_cpu_profile(role: str, tmp_path: Path) -> None:
    words, env, config = processes(render(profile="cpu"))[f"Deployment/demo-diptych-{role}"]
    (tmp_path / "config.yaml").write_text(config)
    done = subprocess.run(
        [sys.executable, "-m", *words[:2], "--config", str(tmp_path / "config.yaml"), "--check"],
        env=env | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
