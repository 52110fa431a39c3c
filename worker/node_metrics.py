"""Prometheus metrics of a worker that spans nodes. Declared by its leader, and by each follower."""

from prometheus_client import CollectorRegistry, Gauge


def nodes_joined(registry: CollectorRegistry) -> Gauge:
    """How many nodes take part; the leader shows it."""
    return Gauge(
        "diptych_nodes_joined", "Other nodes that take part in this worker.", registry=registry
    )


def node_silence(registry: CollectorRegistry) -> Gauge:
    """How long other nodes have said nothing, by node; a follower hears its leader, node 0."""
    return Gauge(
        "diptych_node_silence_seconds",
        "Time since the last sign of life of another node of this worker.",
        ["node"],
        registry=registry,
    )
