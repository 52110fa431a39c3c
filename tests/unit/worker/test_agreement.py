"""What nodes of a worker must agree on: every setting that a rank computes by, and nothing else."""

from pathlib import Path

from engine.config import EngineConfig
from tests.support.models import make_checkpoint
from tests.support.nodes import node_settings
from worker.agreement import AGREED_SETTINGS, agreed, differences
from worker.settings import WorkerSettings

OF_EACH_NODE = {
    *("model", "served_model_name", "num_threads", "node_rank", "leader_address"),
    *("host", "port", "advertise_host", "metrics_port", "rendezvous_port", "worker_id"),
    *("auth_token", "tls_cert", "tls_key", "tls_ca", "tls_server_name", "insecure"),
    *("zone", "rack", "node", "faults", "placement", "ray_address", "ray_strategy"),
    *("node_timeout_s", "heartbeat_interval_s", "report_interval_s", "stall_after_s"),
    *("start_timeout_s", "drain_timeout_s", "log_level", "log_format"),
}
"""Where a node is and how it is watched; its model is compared by digest."""


def test_every_setting_is_compared_or_known_to_be_of_the_node() -> None:
    assert not OF_EACH_NODE & set(AGREED_SETTINGS)
    assert set(WorkerSettings.model_fields) == OF_EACH_NODE | set(AGREED_SETTINGS)
    ours = {"kv_cache_bytes": "kv_cache_memory", "host_kv_bytes": "host_kv_memory"}
    unset = {"rank_timeout_s", "max_waiting", "policy"}  # no setting of a worker
    for name in set(EngineConfig.__dataclass_fields__) - unset - OF_EACH_NODE:
        assert ours.get(name, name) in AGREED_SETTINGS


def test_equal_models_may_lie_elsewhere_and_others_differ(tmp_path: Path) -> None:
    here, there = (make_checkpoint(tmp_path / name) for name in ("a", "b"))
    terms = agreed(node_settings(here), "decode")
    assert differences(terms, agreed(node_settings(there, num_threads=7), "decode"), 1) == ""
    other = agreed(node_settings(make_checkpoint(tmp_path, seed=1)), "decode")
    assert differences(terms, other, 1).startswith("model digest is ")
    dummy = [agreed(node_settings(here, load_format="dummy", seed=n), "decode") for n in (1, 2)]
    assert "seed is 1 on the leader and 2 on node 3" in differences(*dummy, 3)


def test_a_difference_is_shown_briefly_whatever_a_node_sends() -> None:
    theirs = {f"name{number}": "x" * 10_000 for number in range(100)}
    text = differences({}, theirs, 1)
    assert "name0 is unknown on the leader" in text and "and 94 more" in text
    assert len(text) < 1500
