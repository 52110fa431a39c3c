"""A node in the hands of an actor, without Ray."""

import json
from pathlib import Path

from worker.ray_node import NodeActor, node_environment


def test_the_environment_of_a_host_reaches_its_node_but_for_what_would_change_it() -> None:
    host = {"HF_HOME": "/models", "RAY_JOB_ID": "1", "DIPTYCH_PREFILL_PORT": "1", "PATH": "/bin"}
    kept = {"HF_HOME": "/models", "PATH": "/bin"}
    assert node_environment(host, "prefill") == kept
    assert node_environment(host, "decode") == kept | {"DIPTYCH_PREFILL_PORT": "1"}


def test_settings_reach_the_node_and_its_end_is_told(tmp_path: Path) -> None:
    settings = json.dumps({"auth_token": "hidden", "port": -1}).encode()
    status, log = NodeActor().run("prefill", settings, str(tmp_path))
    assert status == 2
    assert "port = -1 (/proc/self/fd/" in log and "greater than or equal to 0" in log
    assert "hidden" not in log
