"""A node in the hands of an actor, without Ray."""

import json
import signal
import sys
from pathlib import Path

from tests.support.models import make_checkpoint
from tests.support.nodes import follower_settings
from tests.support.process import alive, descendants, free_port, running, wait_until
from worker.engine_child import settings_values
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


def test_a_node_does_not_outlive_its_actor(tmp_path: Path) -> None:
    settings = follower_settings(make_checkpoint(tmp_path), f"127.0.0.1:{free_port()}")
    values = json.dumps(settings_values(settings))
    actor = "import sys; from worker.ray_node import NodeActor as Actor; "
    actor += "Actor().run('prefill', sys.argv[1].encode(), '.')"
    with running([sys.executable, "-c", actor, values], name="actor") as process:
        process.wait_for_line("waiting for the leader", 20)
        (node,) = descendants(process.pid)
        process.signal(signal.SIGKILL)
        wait_until(lambda: not alive(node), 5, "the node to end")
