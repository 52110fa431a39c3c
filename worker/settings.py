"""What a user can set on a worker, whichever its role."""

import re
from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator

from core.settings import ByteSize, Seconds
from engine.config import EngineConfig
from telemetry.faults import fault_text


def _known_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ValueError("give auto, cpu, cuda, or one GPU as in cuda:0")
    return name


Device = Annotated[str, AfterValidator(_known_device)]
FaultText = Annotated[str, AfterValidator(fault_text)]


class WorkerSettings(BaseModel):
    """Settings of one worker. User intent only: what follows from it is derived elsewhere."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        "demo", description="Folder in Hugging Face form, a .gguf file, or `demo` (SmolLM2-135M)."
    )
    served_model_name: str | None = Field(
        None, description="Name that routers announce; default: the last part of the model path."
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        "auto", description="`dummy` makes seeded random weights of the model's configuration."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and KV; auto: float32 on a CPU, the checkpoint's on a GPU."
    )
    device: Device = Field(
        "auto",
        description="auto, cpu, cuda, or one GPU as in `cuda:1`; auto: a GPU if torch sees one.",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        description="Devices that share every layer; on each host those from `device` on.",
    )
    nodes: int = Field(
        1, ge=1, description="Hosts that this worker spans, with as many devices of each."
    )
    node_rank: int = Field(
        0, ge=0, description="Which of them this is. 0 leads: routers and peers talk to it alone."
    )
    leader_address: str | None = Field(
        None, description="host:port of the leader's gRPC port; every other node needs it."
    )
    rendezvous_port: int = Field(
        9201,
        ge=0,
        le=65535,
        description="With several nodes: port of the leader where ranks meet; 0 takes a free one.",
    )
    node_timeout_s: Seconds = Field(
        10.0,
        gt=0,
        description="Seconds of silence after which another node of this worker counts as lost; "
        "the leader's holds.",
    )

    placement: Literal["manual", "ray"] = Field(
        "manual",
        description="Who starts the other nodes: `ray` lets the leader have Ray place and start "
        "them; manual: whoever started the leader.",
    )
    ray_address: str = Field(
        "auto",
        description="host:port of the Ray cluster that this host is part of; auto: the one that "
        "runs here.",
    )
    ray_strategy: Literal["strict_spread", "pack"] = Field(
        "strict_spread",
        description="How Ray lays nodes out: strict_spread, each on a host of its own, or pack, "
        "on as few as can hold them.",
    )

    host: str = Field("127.0.0.1", description="Address that the gRPC and metrics ports bind to.")
    port: int = Field(9001, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    advertise_host: str | None = Field(
        None, description="Address that peers reach this worker at; default: `host`."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 takes a free one."
    )
    worker_id: str | None = Field(
        None, description="Stable name of this worker; default: role, host and port."
    )
    auth_token: SecretStr | None = Field(
        None, description="Shared token that every gRPC call must carry."
    )
    tls_cert: str | None = Field(
        None,
        description="PEM file of this process's certificate; all TLS files are read again when "
        "they change.",
    )
    tls_key: str | None = Field(None, description="PEM file of the certificate's key.")
    tls_ca: str | None = Field(
        None, description="PEM file of the CA that peers' certificates must come from."
    )
    tls_server_name: str | None = Field(
        None,
        description="Name that peers' certificates bear; default: the address of each.",
    )
    insecure: bool = Field(
        False, description="Allow a port beyond loopback with neither token nor TLS."
    )

    block_size: int = Field(16, ge=1, le=256, description="Tokens per KV block.")
    num_blocks: int | None = Field(
        None, ge=2, description="KV blocks in the pool; default: as many as fit kv_cache_memory."
    )
    kv_cache_memory: ByteSize | None = Field(
        None,
        ge=1,
        description="Bytes of the KV pool when num_blocks is not set; default: with flashinfer "
        "what gpu_memory_utilization leaves, else 1 GiB.",
    )
    host_kv_memory: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="Memory of each host for blocks that the KV pool evicts, from where they come "
        "back when a prompt needs them; pinned where there is a GPU. 0: none.",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of a GPU's memory for weights, KV and computing; `diptych serve` "
        "divides it among workers on the same GPU.",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt + output in tokens; default: the model's own limit."
    )
    max_num_seqs: int | None = Field(
        None, ge=1, description="Most sequences in one step; default: 64 on a CPU, 256 on a GPU."
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens computed in one step, prompts and decodes together; default: 512 "
        "on a CPU, 8192 on a GPU.",
    )
    max_chunk_tokens: int | None = Field(
        None, ge=1, description="Most prompt tokens of one request per step; default: no own limit."
    )
    prefix_caching: bool = Field(True, description="Keep blocks of finished requests for reuse.")
    attention_backend: Literal["auto", "torch_native", "flashinfer"] = Field(
        "auto",
        description="auto: flashinfer on a GPU that can have it, else torch_native, which runs "
        "everywhere.",
    )
    cuda_graphs: bool = Field(
        True, description="Replay decode steps on a GPU as one launch; off: for debugging."
    )
    grammar_backend: Literal["llguidance", "xgrammar"] = Field(
        "llguidance",
        description="Library behind structured output; xgrammar is an extra. Give all workers the "
        "same.",
    )
    num_threads: int | None = Field(
        None, ge=1, description="Compute threads; default: every core this process may use."
    )
    seed: int = Field(0, ge=0, description="Seed of dummy weights.")

    kv_transport: Literal["auto", "gpu", "nixl", "mooncake", "tcp"] = Field(
        "auto",
        description="How KV blocks move; auto: gpu between GPUs, else nixl where it is installed "
        "and copies one-sidedly, else tcp; docs/transports.md says what each needs.",
    )

    descriptor_bytes: ByteSize | None = Field(
        None,
        ge=1,
        description="Most bytes of KV that nixl moves with one descriptor; default: no limit.",
    )

    zone: str = Field("", description="Zone that this worker runs in, as routers compare it.")
    rack: str = Field("", description="Rack within the zone, or whatever shares a fast network.")
    node: str = Field("", description="Host within the rack.")

    heartbeat_interval_s: Seconds = Field(
        0.1, gt=0, description="Seconds between two signs of life of the engine loop."
    )
    report_interval_s: Seconds = Field(
        0.25, gt=0, description="Seconds between two load reports to each router."
    )
    stall_after_s: Seconds = Field(
        30.0, gt=0, description="Seconds without a sign of life after which the worker is stalled."
    )
    start_timeout_s: Seconds = Field(
        600.0,
        gt=0,
        description="Seconds that loading the model may take, and waiting for other nodes.",
    )
    drain_timeout_s: Seconds = Field(
        30.0,
        ge=0,
        description="Seconds that SIGTERM leaves running requests to finish; routers take what "
        "is left then to other workers.",
    )

    faults: FaultText = Field(
        "",
        description="Fails on purpose, for tests: a text such as kv.read:fail@0.1;seed=7, or a "
        "file of it; docs/fault-injection.md has the names; default: none.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe messages to log."
    )
    log_format: Literal["console", "json"] = Field("console", description="Form of log lines.")

    @model_validator(mode="after")
    def _check_nodes(self) -> Self:
        if self.node_rank >= self.nodes:
            raise ValueError(
                f"node_rank is {self.node_rank}, but nodes is {self.nodes}: nodes are numbered "
                "from 0."
            )
        if self.placement == "ray":
            self._check_placement()
        if self.nodes == 1:
            return self
        if self.tensor_parallel_size % self.nodes:
            raise ValueError(
                f"tensor_parallel_size is {self.tensor_parallel_size}, which {self.nodes} nodes "
                "can't share evenly; it counts the devices of all of them."
            )
        if self.node_rank and not re.fullmatch(r".+:\d+", self.leader_address or ""):
            raise ValueError(
                f"node_rank is {self.node_rank}: give leader_address, host:port of node 0's gRPC "
                "port."
            )
        if self.own_host in ("0.0.0.0", "::", "[::]"):
            raise ValueError(
                f"Other nodes can't connect to {self.own_host}: set advertise_host to an address "
                "of this host."
            )
        return self

    def _check_placement(self) -> None:
        if self.nodes == 1 or self.node_rank:
            raise ValueError(
                "placement is ray, which is for the leader of several nodes: set nodes to 2 or "
                "more, and start node 0 alone."
            )
        if "://" in self.ray_address:
            raise ValueError(
                f"ray_address is {self.ray_address}: give host:port of a cluster that this host is "
                "part of, or auto; Ray's client can't place nodes beside the leader."
            )
        if self.device.startswith("cuda:"):
            raise ValueError(
                f"device is {self.device}, but Ray chooses among the GPUs of a host: set it to "
                "cuda."
            )

    @property
    def own_host(self) -> str:
        """Name or address at which others reach this host."""
        return self.advertise_host or self.host

    @property
    def loopback(self) -> bool:
        """True if no peer can be on another machine."""
        try:
            return ip_address(self.own_host).is_loopback
        except ValueError:
            return self.own_host == "localhost"


def engine_config(settings: WorkerSettings) -> EngineConfig:
    """The engine's share of the settings."""
    return EngineConfig(
        model=settings.model,
        load_format=settings.load_format,
        dtype=settings.dtype,
        device=settings.device,
        tensor_parallel_size=settings.tensor_parallel_size,
        nodes=settings.nodes,
        start_timeout_s=settings.start_timeout_s,
        block_size=settings.block_size,
        num_blocks=settings.num_blocks,
        kv_cache_bytes=settings.kv_cache_memory,
        host_kv_bytes=settings.host_kv_memory,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_step_tokens=settings.max_step_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
        prefix_caching=settings.prefix_caching,
        attention_backend=settings.attention_backend,
        cuda_graphs=settings.cuda_graphs,
        grammar_backend=settings.grammar_backend,
        num_threads=settings.num_threads,
        seed=settings.seed,
    )
