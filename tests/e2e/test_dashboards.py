"""Every query of every panel, rule and runbook, run by a real Prometheus over the real system."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scripts.dashboards.product import RULES, Product
from tests.support.cluster import Cluster, cluster, stream_events
from tests.support.process import wait_until
from tests.support.prometheus import Prometheus, ScrapedProcess, prometheus, tools_or_skip

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = ROOT / "docs/runbooks"
ANY = {"namespace": ".*", "release": ".*", "pool": ".*", "worker": ".*"}
VIEWS = {
    "everything": ANY,
    "one release": {**ANY, "namespace": "demo", "release": "shop", "pool": "pre|dec"},
    # A regular expression that matches nothing else than the empty string: no such label.
    "no labels but our own": {**ANY, "namespace": "", "release": "", "pool": ""},
}
NOT_HERE = {
    ("Where time goes", "Lost to failures"): "no attempt fails here",
    ("Router decisions", "Left alone after failures"): "the same",
    ("Router decisions", "Shut out, how often"): "the same",
    ("Overview", "Callers that were turned away"): "no keys are asked for here",
    ("Engine and GPU", "Other nodes of a worker"): "each is on one node here",
    ("Autoscaling", "What diptych autoscale sees"): "nothing scales here",
    ("Autoscaling", "Decisions of diptych autoscale"): "the same",
    **{
        ("Router decisions", panel): "workers are named by hand here"
        for panel in (
            *("Listed workers", "Last word of the API server", "Requests to the API server"),
            "Endpoints that are no workers",
        )
    },
}
"""Panels that may be empty in this test, and why; beside those of other exporters' metrics."""


@pytest.fixture(scope="module")
def system(tiny_llama: Path) -> Iterator[Cluster]:
    worker = {"num_blocks": 64, "host_kv_memory": "64MiB", "max_step_tokens": 64}
    slo = {"slo_ttft_s": 5, "slo_tpot_s": "500ms", "slo_itl_s": 1}
    with cluster(tiny_llama, transport="tcp", worker=worker, router=slo) as system:
        yield system


@pytest.fixture(scope="module")
def observed(system: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that saw the system under all kinds of load, scraped in two ways."""
    shop = {"namespace": "demo", "release": "shop"}
    pools = {"prefill": "pre", "decode": "dec"}
    ports = [
        (system.port, {}),
        *((w.metrics_port, {"pool": pools[w.role]}) for w in system.workers),
    ]
    jobs = {
        "plain": [ScrapedProcess(port, {}) for port, _ in ports],
        "labelled": [ScrapedProcess(port, {**shop, **pool}) for port, pool in ports],
    }
    folder = tmp_path_factory.mktemp("prometheus")
    with prometheus(tools_or_skip(), folder, jobs, rules=ROOT / RULES) as running:
        wait_until(
            lambda: len(running.query("up == 1")) == 2 * len(ports), 20, "every target to be up"
        )
        load(system)
        wait_until(lambda: settled(system, running), 40, "Prometheus to have seen the load")
        yield running


def load(system: Cluster) -> None:
    """Streams, whole answers, cached and evicted prompts, refusals, a client that leaves."""
    model = system.get("/v1/models").json()["data"][0]["id"]
    prompts = [f"{number} " + "once upon a time in a far country " * 12 for number in range(8)]
    with httpx.Client(base_url=system.url, timeout=60, trust_env=False) as client:
        for round_number in range(3):
            for number, known in enumerate(prompts):
                # Every other prompt is new in each round, so that KV moves in each.
                prompt = known if number % 2 else f"{round_number} {known}"
                body = {"model": model, "prompt": prompt, "max_tokens": 6, "ignore_eos": True}
                if number % 2:
                    assert client.post("/v1/completions", json=body).status_code == 200
                    continue
                with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as it:
                    assert len(list(stream_events(it))) >= 1
            refused = {"model": model, "prompt": "x", "max_tokens": -1}
            assert client.post("/v1/completions", json=refused).status_code == 400
            endless = {"model": model, "prompt": "leave", "max_tokens": 500, "ignore_eos": True}
            with client.stream(
                "POST", "/v1/completions", json={**endless, "stream": True}
            ) as answer:
                next(answer.iter_lines())
            late = {"x-request-timeout": "0.2"}
            body = {**endless, "prompt": f"late {round_number}", "max_tokens": 800}
            # Too late while it runs, or known to be before it is let in.
            status = client.post("/v1/completions", json=body, headers=late).status_code
            assert status in (429, 504)
    system.wait_balanced()


def settled(system: Cluster, running: Prometheus) -> bool:
    """True once the router's counters in Prometheus are those of now, seen by the rules too."""
    name = "diptych_router_generations_total"
    lines = system.get("/metrics").text.splitlines()
    now = sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))
    seen = running.query(f'sum({name}{{job="plain"}})')
    recorded = running.query("diptych:prefix_cache_hit:ratio_rate5m")
    out = running.query('diptych_kv_tier_bytes_total{direction="out"} > 0')
    # Links are measured once they are unused; of READs two samples are needed.
    link = running.query("diptych_kv_link_latency_seconds > 0")
    reads = running.query("rate(diptych_kv_link_read_seconds_total[1m]) > 0")
    return bool(seen) and seen[0][1] == now and all((recorded, out, link, reads))


@pytest.mark.parametrize("view", VIEWS)
def test_no_panel_is_empty_that_should_not_be(observed: Prometheus, view: str) -> None:
    product, empty = Product(), []
    external = {name for name, one in product.catalogue.families.items() if one.exporter}
    for board in product.boards:
        for panel in board.panels:
            for query in panel.queries:
                values = observed.query(substituted(query.vector.text, VIEWS[view]))
                finite = [value for _, value in values if math.isfinite(value)]
                foreign = query.vector.families & external
                known = foreign or (board.title, panel.title) in NOT_HERE
                assert panel.empty_when or not known, f"{panel.title} does not say when it is empty"
                if not finite and not known:
                    empty.append(f"{board.title} / {panel.title}: {query.vector.text}")
    assert not empty, "\n".join(empty)


def test_variables_offer_what_there_is(observed: Prometheus, system: Cluster) -> None:
    offered: dict[str, set[str]] = {}
    for board in Product().boards:
        for variable in board.json()["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match is not None
            values = observed.label_values(substituted(match[1], ANY), match[2])
            offered.setdefault(variable["name"], set()).update(values)
    assert offered["namespace"] == {"demo"} and offered["release"] == {"shop"}
    assert offered["pool"] == {"pre", "dec"}
    assert len(offered["worker"]) == len(system.workers)


def test_every_rule_is_evaluated(observed: Prometheus) -> None:
    product = Product()
    groups = observed.ask("rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(rules) == {one.name for one in (*product.recordings, *product.alerts)}
    for rule in rules.values():
        assert rule["health"] == "ok", rule
    for recording in product.recordings:
        assert observed.query(recording.name), f"{recording.name} records nothing"
    firing = {name for name, rule in rules.items() if rule.get("state") == "firing"}
    assert not firing


def test_queries_of_runbooks_run(observed: Prometheus) -> None:
    blocks = [
        (path.name, query)
        for path in sorted(RUNBOOKS.glob("*.md"))
        for query in re.findall(r"```promql\n(.*?)```", path.read_text(), re.DOTALL)
    ]
    assert blocks
    for _name, query in blocks:
        observed.query(query)


def substituted(expression: str, variables: dict[str, str]) -> str:
    """An expression of a dashboard as Grafana sends it."""
    text = expression.replace("$__rate_interval", "1m")
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    assert "$" not in text, text
    return text
