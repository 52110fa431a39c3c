"""A real Prometheus on loopback, scraping what a test runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.fetch_prometheus import PrometheusTools, PrometheusUnavailable, fetch
from tests.support.process import Process, free_port, running, wait_until

START_S = 30.0


def tools_or_skip() -> PrometheusTools:
    """The programs; skips the test that asked where they can't be had."""
    try:
        return fetch()
    except PrometheusUnavailable as error:
        pytest.skip(str(error))


@dataclass(frozen=True)
class ScrapedProcess:
    """A process with /metrics, and the labels that its scrape adds."""

    port: int
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Prometheus:
    """One that runs."""

    process: Process
    url: str
    client: httpx.Client

    def ask(self, path: str, **params: str) -> Any:
        """The data of an API call; fails with what Prometheus says of it."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=params).json()
        assert answer["status"] == "success", f"{params}: {answer.get('error')}"
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant vector, as of now."""
        data = self.ask("query", query=expression)
        return [(one["metric"], float(one["value"][1])) for one in data["result"]]

    def label_values(self, selector: str, label: str) -> set[str]:
        """What a variable of a dashboard offers."""
        return set(self.ask(f"label/{label}/values", **{"match[]": selector}))


@contextmanager
def prometheus(
    tools: PrometheusTools,
    folder: Path,
    jobs: Mapping[str, Sequence[ScrapedProcess]],
    *,
    rules: Path,
    interval_s: float = 0.5,
) -> Iterator[Prometheus]:
    """Scrape `jobs` and evaluate `rules`, both every `interval_s`, until the context ends."""
    port, interval = free_port(), f"{int(interval_s * 1000)}ms"
    config = {
        "global": {
            "scrape_interval": interval,
            "scrape_timeout": interval,
            "evaluation_interval": interval,
        },
        "rule_files": [str(rules)],
        "scrape_configs": [
            {
                "job_name": job,
                "static_configs": [
                    {"targets": [f"127.0.0.1:{one.port}"], "labels": dict(one.labels)}
                    for one in processes
                ],
            }
            for job, processes in jobs.items()
        ],
    }
    path = folder / "prometheus.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [
        str(tools.prometheus),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    url = f"http://127.0.0.1:{port}"
    with (
        running(command, name="prometheus", cwd=str(folder)) as process,
        httpx.Client(trust_env=False, timeout=10) as client,
    ):

        def ready() -> bool:
            assert process.running, process.log
            try:
                return client.get(f"{url}/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, START_S, "Prometheus to be ready", lambda: process.log)
        yield Prometheus(process, url, client)
