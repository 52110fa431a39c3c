"""Metrics of other exporters on our dashboards. None is needed; panels say who shows them."""

from scripts.dashboards.family import Family

_DCGM = "NVIDIA's dcgm-exporter"
_KUBE = "kube-state-metrics"
_NODE = "node-exporter"


def _gauge(name: str, meaning: str, exporter: str, *labels: str) -> Family:
    return Family(
        name=name,
        kind="counter" if name.endswith("_total") else "gauge",
        meaning=meaning,
        values={label: frozenset[str]() for label in labels},
        scraped=frozenset({"namespace", "pod"} if exporter == _KUBE else {"instance"}),
        exporter=exporter,
    )


EXTERNAL = (
    _gauge(
        "DCGM_FI_DEV_GPU_UTIL", "Share of time a kernel ran, percent.", _DCGM, "gpu", "Hostname"
    ),
    _gauge("DCGM_FI_DEV_FB_USED", "GPU memory in use, MiB.", _DCGM, "gpu", "Hostname"),
    _gauge("DCGM_FI_DEV_FB_FREE", "GPU memory free, MiB.", _DCGM, "gpu", "Hostname"),
    _gauge(
        "DCGM_FI_PROF_DRAM_ACTIVE", "Share of cycles memory moved data.", _DCGM, "gpu", "Hostname"
    ),
    _gauge(
        "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE",
        "Share of cycles tensor cores worked.",
        _DCGM,
        *("gpu", "Hostname"),
    ),
    _gauge(
        "DCGM_FI_PROF_NVLINK_TX_BYTES", "Bytes per second sent by NVLink.", _DCGM, "gpu", "Hostname"
    ),
    _gauge(
        "DCGM_FI_PROF_NVLINK_RX_BYTES",
        "Bytes per second received by NVLink.",
        _DCGM,
        *("gpu", "Hostname"),
    ),
    _gauge(
        "node_infiniband_port_data_received_bytes_total",
        "Bytes received by RDMA.",
        _NODE,
        *("device", "port"),
    ),
    _gauge(
        "node_infiniband_port_data_transmitted_bytes_total",
        "Bytes sent by RDMA.",
        _NODE,
        *("device", "port"),
    ),
    _gauge(
        "kube_horizontalpodautoscaler_status_desired_replicas",
        "Replicas that an autoscaler wants.",
        _KUBE,
        "horizontalpodautoscaler",
    ),
    _gauge(
        "kube_horizontalpodautoscaler_status_current_replicas",
        "Replicas that there are.",
        _KUBE,
        "horizontalpodautoscaler",
    ),
    _gauge(
        "kube_horizontalpodautoscaler_spec_max_replicas",
        "Replicas that there may be.",
        _KUBE,
        "horizontalpodautoscaler",
    ),
    _gauge("kube_pod_container_status_restarts_total", "Restarts of a container.", _KUBE),
)
