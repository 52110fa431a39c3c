"""Prometheus metrics of a worker that spans nodes."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Gauge


def show_joined(registry: CollectorRegistry, count: Callable[[], int]) -> None:
    """On the leader: how many other nodes take part, asked at each scrape."""
    joined = Gauge(
        "diptych_nodes_joined", "Other nodes that take part in this worker.", registry=registry
    )
    joined.set_function(lambda: float(count()))


def show_silence(registry: CollectorRegistry, ages: Mapping[int, Callable[[], float]]) -> None:
    """On every node: seconds since each of the nodes it listens to was heard, by node."""
    silence = Gauge(
        "diptych_node_silence_seconds",
        "Time since the last sign of life of another node of this worker.",
        ["node"],
        registry=registry,
    )
    for node, age_s in ages.items():
        silence.labels(str(node)).set_function(age_s)
