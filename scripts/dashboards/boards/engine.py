"""Processes of workers, their engines, and the devices below them."""

from scripts.dashboards.board import Board, Row
from scripts.dashboards.boards.latency import quantiles
from scripts.dashboards.panels import Query, Steps, graph, listing
from scripts.dashboards.promql import Source

_DCGM = "NVIDIA's dcgm-exporter is not scraped, or there is no GPU."
_KUBE = "kube-state-metrics is not scraped."
_RDMA = "node-exporter is not scraped, or there is no RDMA device."


def board(source: Source) -> Board:
    """The dashboard of processes and devices."""
    return Board(
        name="engine",
        title="Engine and GPU",
        description="Health of every worker process, steps of its engine, and its devices.",
        rows=[_health(source), _steps(source), _processes(source), _devices(source)],
    )


def _health(source: Source) -> Row:
    return Row(
        "Health",
        [
            listing(
                "What runs",
                "Every process and its version. Two versions at once are normal only during an "
                "upgrade.",
                Query(
                    source.now("diptych_build_info").count(
                        "component", "version", "namespace", "release", "instance"
                    )
                ),
                columns=("component", "version", "namespace", "release", "instance"),
            ),
            graph(
                "Ready",
                "1 while a worker would take a request. 0 for long: it loads, drains or hangs; "
                "see the heartbeat.",
                Query(source.now("diptych_worker_ready").max("worker"), "{{worker}}"),
                runbooks=("DiptychWorkerNotReady",),
            ),
            graph(
                "Age of the heartbeat",
                "Seconds since the engine loop last turned. It grows while a model loads; else "
                "above a few seconds a step hangs.",
                Query(source.now("diptych_engine_heartbeat_age_seconds").max("worker"),
                      "{{worker}}"),
                unit="s",
                steps=Steps(warn=5, bad=15),
                runbooks=("DiptychEngineStalled",),
            ),
            graph(
                "Open streams",
                "Of routers and of peers, for each worker. It should be routers plus the workers "
                "of the other pool.",
                Query(source.now("diptych_attached_streams").max("worker"), "{{worker}}"),
            ),
            graph(
                "Starts",
                "Starts of worker processes in the last half hour.",
                Query(
                    source.over("30m")
                    .changes("diptych_worker_process_start_time_seconds")
                    .sum("worker"),
                    "{{worker}}",
                ),
                runbooks=("DiptychWorkerRestarts",),
            ),
            graph(
                "Other nodes of a worker",
                "Nodes that take part in workers that span several, and seconds since each was "
                "last heard. A silence that grows ends the worker on all of them.",
                Query(source.now("diptych_nodes_joined").max("worker"), "{{worker}} joined"),
                Query(source.now("diptych_node_silence_seconds").max("worker", "node"),
                      "{{worker}} node {{node}}, s"),
                empty_when="no worker spans nodes.",
            ),
            graph(
                "Restarts of containers",
                "As Kubernetes counts them, in the last half hour.",
                Query(
                    source.over("30m")
                    .increase("kube_pod_container_status_restarts_total")
                    .sum("pod"),
                    "{{pod}}",
                ),
                empty_when=_KUBE,
            ),
        ],
    )  # fmt: skip


def _steps(source: Source) -> Row:
    return Row(
        "Steps",
        [
            graph(
                "Steps per second",
                "Of each worker. Few with requests running: steps are long, see the right.",
                Query(source.observed("diptych_step_duration_seconds").sum("worker"),
                      "{{worker}}"),
                unit="ops",
            ),
            graph(
                "Duration of steps",
                "99 of 100 are shorter, by role and kind.",
                *quantiles(source, "diptych_step_duration_seconds", "role", "kind",
                           shares=(0.99,)),
                unit="s",
            ),
            graph(
                "Time spent in steps",
                "Share of each worker's time. Near 1 it is busy; well below with requests waiting, "
                "the host can't keep up with the device.",
                Query(source.added("diptych_step_duration_seconds").sum("worker"), "{{worker}}"),
                unit="percentunit",
            ),
        ],
    )  # fmt: skip


def _processes(source: Source) -> Row:
    return Row(
        "Processes",
        [
            graph(
                "Cores of engine processes",
                "An engine on a GPU uses about one core; if that is throttled, steps wait for it.",
                Query(source.rate("diptych_engine_process_cpu_seconds_total").sum("worker"),
                      "{{worker}}"),
            ),
            graph(
                "Memory of engine processes",
                "Resident, host tier included. Growth without end is a leak; report it.",
                Query(
                    source.now("diptych_engine_process_resident_memory_bytes").max("worker"),
                    "{{worker}}",
                ),
                unit="bytes",
            ),
            graph(
                "Cores of service processes",
                "They carry messages between routers and the engine: little.",
                Query(source.rate("diptych_worker_process_cpu_seconds_total").sum("worker"),
                      "{{worker}}"),
            ),
        ],
    )  # fmt: skip


def _devices(source: Source) -> Row:
    gpu = ("Hostname", "gpu")
    legend = "{{Hostname}} {{gpu}}"
    return Row(
        "Devices",
        [
            graph(
                "GPU: share of time a kernel ran",
                "Near 100% says little; the two to the right say what it does.",
                Query(source.now("DCGM_FI_DEV_GPU_UTIL").max(*gpu), legend),
                unit="percent",
                empty_when=_DCGM,
            ),
            graph(
                "GPU: tensor cores at work",
                "High on prefill. Low there with a backlog: prompts come in small chunks.",
                Query(source.now("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE").max(*gpu), legend),
                unit="percentunit",
                empty_when=_DCGM,
            ),
            graph(
                "GPU: memory bandwidth in use",
                "High on decode. Low there: batches are small.",
                Query(source.now("DCGM_FI_PROF_DRAM_ACTIVE").max(*gpu), legend),
                unit="percentunit",
                empty_when=_DCGM,
            ),
            graph(
                "GPU: memory in use",
                "Share. Steady by design: the KV pool is taken at start.",
                Query(
                    source.now("DCGM_FI_DEV_FB_USED").max(*gpu)
                    / (
                        source.now("DCGM_FI_DEV_FB_USED").max(*gpu)
                        + source.now("DCGM_FI_DEV_FB_FREE").max(*gpu)
                    ),
                    legend,
                ),
                unit="percentunit",
                empty_when=_DCGM,
            ),
            graph(
                "NVLink",
                "Bytes per second, sent and received.",
                Query(source.now("DCGM_FI_PROF_NVLINK_TX_BYTES").max(*gpu), f"{legend} sent"),
                Query(source.now("DCGM_FI_PROF_NVLINK_RX_BYTES").max(*gpu), f"{legend} received"),
                unit="Bps",
                empty_when=_DCGM,
            ),
            graph(
                "RDMA",
                "Bytes per second of each port. 0 while KV moves between hosts: transfers do not "
                "use RDMA.",
                Query(
                    source.rate("node_infiniband_port_data_received_bytes_total").sum(
                        "instance", "device"
                    ),
                    "{{instance}} {{device}} received",
                ),
                Query(
                    source.rate("node_infiniband_port_data_transmitted_bytes_total").sum(
                        "instance", "device"
                    ),
                    "{{instance}} {{device}} sent",
                ),
                unit="Bps",
                empty_when=_RDMA,
                runbooks=("DiptychTransportMixed",),
            ),
        ],
    )
