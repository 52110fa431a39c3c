"""Values that can't work are refused before anything is installed, with what to do instead."""

import pytest
from pydantic import BaseModel

from decode.settings import DecodeSettings
from prefill.settings import PrefillSettings
from router.settings import RouterSettings
from tests.support.helm import Manifest, refusal

CONTROLLER = {"enabled": True, "kind": "controller"}
SCALED = {"autoscaling": CONTROLLER}


def pool(**values: object) -> Manifest:
    return {"pools": {"decode": {"role": "decode", **values}}}


def router(**values: object) -> Manifest:
    return {"router": values}


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (router(config={"port": 9000}), "Use service.port"),
        (router(config={"discovery": "static"}), "Set router.config.prefill"),
        (router(config={"decode": ["a:1"]}), "Set router.config.discovery to static"),
        ({"grpc": {"auth": {"enabled": False}}}, "Set grpc.auth.enabled or grpc.tls.enabled"),
        ({"grpc": {"auth": {"existingSecret": "a", "token": "b"}}}, "Set one of them"),
        (
            {"grpc": {"tls": {"enabled": True, "certManager": {"enabled": True}}}},
            "Set grpc.tls.certManager.issuerRef.name",
        ),
        (router(tls={"enabled": True}), "Set router.tls.existingSecret"),
        (
            router(tls={"enabled": True, "certManager": {"enabled": True}}),
            "Set router.tls.certManager.issuerRef.name",
        ),
        (router(ingress={"enabled": True}), "Set router.ingress.hosts"),
        (router(httpRoute={"enabled": True}), "Set router.httpRoute.parentRefs"),
        (
            router(autoscaling={"enabled": True, "minReplicas": 9}),
            "Raise router.autoscaling.maxReplicas",
        ),
        (router(terminationGracePeriodSeconds=100), "Set at least 135"),
        ({"model": {"source": "pvc"}}, "Set model.pvc.claimName"),
        ({"model": {"source": "image"}}, "Set model.image.reference"),
        ({"model": {"source": "huggingface"}}, "Set model.huggingface.repo"),
        (pool(model={"source": "pvc"}), "Set pools.decode.model.pvc.claimName"),
        (pool(config={"tensor_parallel_size": 2}), "Use tensorParallelSize"),
        (pool(config={"metrics_port": 2}), "pods always use one port"),
        (pool(gpus=4, tensorParallelSize=2), "leave tensorParallelSize out"),
        (pool(nodes=2, tensorParallelSize=3), "Make it a multiple of nodes"),
        (pool(nodes=2, cacheClaim="x"), "Leave it out"),
        (pool(nodes=2) | {"fullnameOverride": "a" * 40}, "at most 32 characters"),
        (pool(rdma={"runAsRoot": True}), "Set rdma.enabled"),
        (pool(affinity={"podAffinity": {"a": "b"}}) | {"sameZone": {"mode": "required"}}, "Remove"),
        (pool(autoscaling={"enabled": True, "minReplicas": 9}), "Raise maxReplicas"),
        (
            {"pools": {"decode": {"role": "decode"}, "two": {"role": "decode", **SCALED}}},
            "several pools of that role",
        ),
        (pool(terminationGracePeriodSeconds=30), "Set at least 65"),
        ({"pools": {"Fast": {"role": "decode"}}}, "lower-case letters"),
        ({"pools": {"router": {"role": "decode"}}}, "such as router-pool"),
        ({"pools": {"decode": None}}, "pools.decode.role=decode"),
    ],
)
def test_remedy_is_named(values: Manifest, remedy: str) -> None:
    assert remedy in refusal(values)


def test_image_volume_needs_a_cluster_that_has_them() -> None:
    values = {"model": {"source": "image", "image": {"reference": "r/m:1"}}}
    assert "Use pvc or huggingface" in refusal(values, kube="1.32.0")


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"routers": {}}, "routers"),
        (router(replica=2), "replica"),
        (router(config={"max_inflight": 2}), "max_inflight"),
        (router(config={"console": "yes"}), "console"),
        (pool(roles="decode"), "roles"),
        (pool(config={"lease_ttl_s": 3}), "lease_ttl_s"),
        ({"pools": {"fast": {"replicas": 1}}}, "role"),
        ({"pools": {"fast": {"role": "both"}}}, "role"),
        (pool(model={"source": "s3"}), "source"),
        ({"poolDefaults": {"gpus": "two"}}, "gpus"),
        ({"sameZone": {"mode": False}}, "mode"),
    ],
)
def test_unknown_and_misshapen_values_are_named(values: Manifest, place: str) -> None:
    assert place in refusal(values)


def secret_names(cls: type[BaseModel]) -> list[str]:
    return [name for name, each in cls.model_fields.items() if "SecretStr" in repr(each.annotation)]


def test_no_secret_can_be_put_into_a_config_map() -> None:
    assert secret_names(RouterSettings)
    for name in secret_names(RouterSettings):
        assert f"router.config.{name} is set by the chart" in refusal(
            router(config={name: "hunter2"})
        )
    for cls in (PrefillSettings, DecodeSettings):
        for name in secret_names(cls):
            assert f"config.{name} is set by the chart" in refusal(pool(config={name: "hunter2"}))
