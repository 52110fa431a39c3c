"""What pools render to: the contract with routers, devices, deadlines, where pods may run."""

import pytest

from tests.support.helm import NAMESPACE, RELEASE, Manifest, container, render, settings_of

POOLS = {"prefill": {"role": "prefill"}, "long": {"role": "prefill"}, "decode": {"role": "decode"}}


def pool(values: Manifest, *, kube: str = "1.35.0") -> Manifest:
    """The pod of a decode pool with some values."""
    rendering = render({"pools": {"decode": {"role": "decode"} | values}}, kube=kube)
    spec = rendering.one("Deployment", "-decode")["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def test_routers_find_pools_by_the_labels_of_their_services() -> None:
    rendering = render({"pools": POOLS})
    selector = settings_of(rendering, "router")["kubernetes_selector"]
    assert settings_of(rendering, "router")["kubernetes_namespace"] == NAMESPACE
    equal = dict(part.split("=") for part in selector.split(",") if "=" in part)
    there = {part for part in selector.split(",") if "=" not in part}
    chosen = {}
    for service in rendering.of("Service"):
        labels = service["metadata"]["labels"]
        if equal.items() <= labels.items() and there <= labels.keys():
            chosen[labels["diptych.io/pool"]] = labels["diptych.io/role"]
            assert service["spec"]["clusterIP"] == "None"
            assert service["spec"]["publishNotReadyAddresses"] is True
            assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == {
                "grpc": 9001,
                "metrics": 9101,
            }
    assert chosen == {name: each["role"] for name, each in POOLS.items()}
    assert equal["app.kubernetes.io/instance"] == RELEASE


def test_routers_may_take_as_long_as_the_slowest_pool() -> None:
    slow = {
        "prefill": {"role": "prefill", "startTimeoutSeconds": 5000},
        "decode": {"role": "decode"},
    }
    spec = render({"pools": slow}).one("Deployment", "-router")["spec"]
    assert spec["progressDeadlineSeconds"] > 5000


def test_pool_has_its_own_values_over_those_of_all() -> None:
    rendering = render(
        {
            "poolDefaults": {"config": {"block_size": 32, "seed": 1}, "replicas": 3},
            "pools": {
                "prefill": {"role": "prefill", "config": {"seed": 2}, "replicas": 5},
                "decode": {"role": "decode", "model": {"servedName": "other"}},
            },
        }
    )
    prefill, decode = settings_of(rendering, "prefill"), settings_of(rendering, "decode")
    assert (prefill["block_size"], prefill["seed"]) == (32, 2)
    assert (decode["block_size"], decode["seed"]) == (32, 1)
    assert "served_model_name" not in prefill
    assert decode["served_model_name"] == "other"
    assert rendering.one("Deployment", "-prefill")["spec"]["replicas"] == 5
    assert rendering.one("Deployment", "-decode")["spec"]["replicas"] == 3


def test_gpus_are_asked_for_and_all_used() -> None:
    values = {"gpus": 4, "gpuResource": "amd.com/gpu", "resources": {"limits": {"cpu": "8"}}}
    rendering = render({"pools": {"decode": {"role": "decode"} | values}})
    spec = rendering.one("Deployment", "-decode")["spec"]["template"]["spec"]
    assert container(spec)["resources"] == {
        "requests": {"cpu": "2", "memory": "4Gi", "amd.com/gpu": 4},
        "limits": {"cpu": "8", "amd.com/gpu": 4},
    }
    settings = settings_of(rendering, "decode")
    assert (settings["device"], settings["tensor_parallel_size"]) == ("cuda", 4)
    assert settings_of(rendering, "prefill")["device"] == "cpu"


def test_cpu_worker_computes_with_as_many_threads_as_its_quota_lasts_for() -> None:
    def has_threads(values: Manifest) -> bool:
        return any(e["name"].endswith("_NUM_THREADS") for e in container(pool(values))["env"])

    limited = {"resources": {"limits": {"cpu": "2"}}}
    assert has_threads(limited)
    assert not has_threads({})
    assert not has_threads(limited | {"gpus": 1})
    assert not has_threads(limited | {"config": {"num_threads": 3}})


def test_worker_on_several_nodes_is_a_group_with_a_leader() -> None:
    rendering = render({"pools": {"decode": {"role": "decode", "nodes": 2, "gpus": 8}}})
    group = rendering.one("LeaderWorkerSet", "-decode-group")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    leader, follower = (
        container(group[part]["spec"]) for part in ("leaderTemplate", "workerTemplate")
    )
    assert leader["args"] == follower["args"]
    assert leader["args"][1:] == [
        "--nodes=$(LWS_GROUP_SIZE)",
        "--node-rank=$(LWS_WORKER_INDEX)",
        "--leader-address=$(LWS_LEADER_ADDRESS):9001",
    ]
    assert settings_of(rendering, "decode")["tensor_parallel_size"] == 16
    assert leader["startupProbe"]["grpc"] == {"port": 9001}
    assert follower["startupProbe"]["httpGet"]["port"] == "metrics"
    selector = rendering.one("Service", "-decode")["spec"]["selector"]
    assert selector["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    # Its controller makes a Service of the same name as the group, which must not be ours.
    assert not [s for s in rendering.of("Service") if s["metadata"]["name"].endswith("-group")]


def test_rdma_adds_devices_and_the_right_to_pin_memory() -> None:
    spec = pool({"rdma": {"enabled": True, "resource": "rdma/roce", "count": 2}})
    each = container(spec)
    assert each["resources"]["limits"]["rdma/roce"] == 2
    assert each["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert "runAsUser" not in each["securityContext"]
    root = container(pool({"rdma": {"enabled": True, "runAsRoot": True}}))
    assert root["securityContext"]["runAsUser"] == 0
    assert "add" not in container(pool({}))["securityContext"]["capabilities"]


def test_namespace_of_the_node_is_shared_only_if_told() -> None:
    assert "hostIPC" not in pool({})
    assert pool({"hostIPC": True})["hostIPC"] is True


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, 75),
        ({"drainTimeoutSeconds": 300, "preStopSeconds": 5}, 320),
        ({"drainTimeoutSeconds": 300, "terminationGracePeriodSeconds": 400}, 400),
    ],
)
def test_pod_lives_as_long_as_it_drains(values: Manifest, seconds: int) -> None:
    assert pool(values)["terminationGracePeriodSeconds"] == seconds


def test_sleep_before_the_end_fits_the_cluster() -> None:
    assert container(pool({"preStopSeconds": 5}))["lifecycle"] == {
        "preStop": {"sleep": {"seconds": 5}}
    }
    assert container(pool({"preStopSeconds": 5}, kube="1.29.0"))["lifecycle"] == {
        "preStop": {"exec": {"command": ["sleep", "5"]}}
    }


def test_startup_probe_waits_as_long_as_the_worker() -> None:
    rendering = render({"poolDefaults": {"startTimeoutSeconds": 3601}})
    spec = rendering.one("Deployment", "-prefill")["spec"]
    probe = container(spec["template"]["spec"])["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 3601
    assert settings_of(rendering, "prefill")["start_timeout_s"] == 3601
    assert spec["progressDeadlineSeconds"] > 3601


def test_probes_ask_what_can_answer() -> None:
    """Liveness is the engine's heartbeat; a kubelet has no certificate for a gRPC port with TLS."""
    clear = container(pool({}))
    assert clear["startupProbe"]["grpc"] == {"port": 9001}
    assert clear["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert clear["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    rendering = render({"grpc": {"tls": {"enabled": True, "existingSecret": "x"}}})
    sealed = container(rendering.one("Deployment", "-decode")["spec"]["template"]["spec"])
    assert sealed["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}


@pytest.mark.parametrize(("mode", "field"), [("required", "required"), ("preferred", "preferred")])
def test_workers_stay_in_one_zone(mode: str, field: str) -> None:
    rendering = render({"sameZone": {"mode": mode}})
    affinity = rendering.one("Deployment", "-prefill")["spec"]["template"]["spec"]["affinity"]
    (term,) = affinity["podAffinity"][f"{field}DuringSchedulingIgnoredDuringExecution"]
    term = term.get("podAffinityTerm", term)
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    # Prefill follows decode and the other way round: the first of all must match its own term.
    assert term["labelSelector"]["matchExpressions"] == [
        {"key": "diptych.io/role", "operator": "Exists"}
    ]
    template = rendering.one("Deployment", "-prefill")["spec"]["template"]
    assert "diptych.io/role" in template["metadata"]["labels"]


def test_changed_settings_restart_the_pool_and_no_other() -> None:
    def checksums(seed: int) -> dict[str, str]:
        pools = {
            "prefill": {"role": "prefill", "config": {"seed": seed}},
            "decode": {"role": "decode"},
        }
        return {
            each["metadata"]["name"]: each["spec"]["template"]["metadata"]["annotations"][
                "checksum/config"
            ]
            for each in render({"pools": pools}).of("Deployment")
        }

    before, after = checksums(1), checksums(2)
    assert {name for name in before if before[name] != after[name]} == {"demo-diptych-prefill"}


def test_scrapes_name_what_queries_select_by() -> None:
    """Rules, dashboards and triggers tell releases and pools apart by these labels."""
    rendering = render({"metrics": {"podMonitor": {"enabled": True}}})
    for name, labels in (("-workers", {"release", "pool"}), ("-router", {"release"})):
        (endpoint,) = rendering.one("PodMonitor", name)["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] == "metrics"
        assert {each["targetLabel"] for each in endpoint["relabelings"]} == labels


def test_controller_reads_metrics_of_routers_that_ask_others_for_keys() -> None:
    scaling = {"enabled": True, "kind": "controller"}
    values = {
        "pools": {"prefill": {"role": "prefill", "autoscaling": scaling}},
        "router": {"apiKeys": {"enabled": True}},
    }
    rendering = render(values)
    assert settings_of(rendering, "autoscaler")["router"].endswith(":9101")
    policy = rendering.one("NetworkPolicy", "-router")["spec"]["ingress"]
    allowed = [
        rule["ports"][0]["port"]
        for rule in policy
        for source in rule.get("from", ())
        if "autoscaler" in str(source.get("podSelector"))
    ]
    assert allowed == ["metrics"]


def test_controller_is_told_of_its_pools() -> None:
    scaling = {"enabled": True, "kind": "controller", "maxReplicas": 6}
    values = {
        "prefill": {"role": "prefill", "autoscaling": scaling | {"targetBusyShare": 0.5}},
        "decode": {"role": "decode", "nodes": 2, "autoscaling": scaling},
    }
    rendering = render({"pools": values})
    assert settings_of(rendering, "autoscaler") == {
        "router": "http://demo-diptych-routers:9101",
        "namespace": NAMESPACE,
        "prefill": "deployment/demo-diptych-prefill",
        "prefill_min": 1,
        "prefill_max": 6,
        "decode": "leaderworkerset/demo-diptych-decode-group",
        "decode_min": 1,
        "decode_max": 6,
        "backlog_s": 0.5,
        "busy": 0.5,
        "kv": 0.75,
        "batch": 0.8,
        "down_after_s": 300,
        "host": "0.0.0.0",
        "metrics_port": 9101,
        "log_format": "json",
    }
    assert rendering.one("Service", "-routers")["spec"]["clusterIP"] == "None"
    assert not [s for s in render().of("Service") if s["metadata"]["name"].endswith("-routers")]


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_autoscaler_owns_the_number_of_replicas(kind: str) -> None:
    scaling = {"enabled": True, "kind": kind, "targetItlSeconds": 0.05}
    values = {
        "prefill": {"role": "prefill", "autoscaling": scaling},
        "decode": {"role": "decode", "nodes": 2, "autoscaling": scaling},
    }
    rendering = render({"pools": values})
    assert "replicas" not in rendering.one("Deployment", "-prefill")["spec"]
    assert "replicas" not in rendering.one("LeaderWorkerSet", "-decode-group")["spec"]
    scalers = rendering.of("HorizontalPodAutoscaler" if kind == "hpa" else "ScaledObject")
    targets = {each["metadata"]["name"]: each["spec"]["scaleTargetRef"] for each in scalers}
    assert targets["demo-diptych-prefill"]["kind"] == "Deployment"
    assert targets["demo-diptych-decode"] == {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "name": "demo-diptych-decode-group",
    }


def test_scaler_asks_for_its_own_pool_only() -> None:
    scaling = {"enabled": True, "kind": "keda"}
    values = {"decode": {"role": "decode", "autoscaling": scaling}}
    triggers = render({"pools": values}).one("ScaledObject", "-decode")["spec"]["triggers"]
    labels = '{namespace="llm",release="demo",pool="decode"}'
    assert [each["metadata"]["query"] for each in triggers] == [
        f"avg(diptych_kv_cache_usage_ratio{labels})",
        f"avg(diptych_batch_usage_ratio{labels})",
    ]
    assert all(each["metricType"] == "Value" for each in triggers)


def test_only_pods_of_the_release_reach_workers() -> None:
    rendering = render()
    spec = rendering.one("NetworkPolicy", "-workers")["spec"]
    template = rendering.one("Deployment", "-decode")["spec"]["template"]["metadata"]["labels"]
    assert spec["podSelector"]["matchLabels"].items() <= template.items()
    peers = [(rule["from"], rule.get("ports")) for rule in spec["ingress"]]
    workers, router, monitoring = peers
    assert workers == ([{"podSelector": spec["podSelector"]}], None)
    assert router[1] == [{"port": "grpc", "protocol": "TCP"}]
    router_labels = rendering.one("Deployment", "-router")["spec"]["selector"]["matchLabels"]
    assert router[0] == [{"podSelector": {"matchLabels": router_labels}}]
    assert monitoring[1] == [{"port": "metrics", "protocol": "TCP"}]
    assert "namespaceSelector" in monitoring[0][0]
