"""What the user decides about one engine. Derived values live where they are derived."""

from dataclasses import dataclass
from typing import Literal

LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Intent only; nothing writes back to it."""

    model: str
    """Folder in Hugging Face form, or a .gguf file."""
    load_format: LoadFormat = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on a CPU, the checkpoint's own on a GPU."""
    device: str = "cpu"
    """Of rank 0; further ranks on GPUs take the ones after it, and so on every other host. auto:
    cuda where torch sees a GPU, else cpu."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer, a process each."""
    nodes: int = 1
    """Hosts that the ranks lie on, as many on each, in the order of their numbers."""
    rank_timeout_s: float = 25.0
    """Longest that ranks wait for one another within a step before the engine gives up."""
    start_timeout_s: float = 600.0
    """Longest that ranks wait for one another while they load."""
    block_size: int = 16
    """Tokens per KV block."""
    num_blocks: int | None = None
    """Blocks in the KV pool; None: as many as fit kv_cache_bytes."""
    kv_cache_bytes: int | None = None
    """Of each rank; None: with flashinfer what gpu_memory_utilization leaves, else 1 GiB."""
    host_kv_bytes: int = 0
    """Of the memory of each host, for blocks that the prefix cache evicts; 0: none."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's whole memory, in (0, 1], that weights, KV pool and computing of this engine
    may take together. Engines that share a GPU need shares that sum to less than one."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens; None: the model's own limit."""
    max_num_seqs: int | None = None
    """Most sequences in one step; None: see engine.limits."""
    max_step_tokens: int | None = None
    """Most tokens computed in one step, decodes and prompt chunks together; None: as above."""
    max_chunk_tokens: int | None = None
    """Most prompt tokens of one request in one step; None: max_step_tokens."""
    max_waiting: int = 1024
    """Most requests that wait for admission; one more is refused as overloaded."""
    policy: Literal["fcfs", "longest_prefix"] = "fcfs"
    """Who is admitted next: the oldest request, or the one with most tokens in the prefix cache."""
    prefix_caching: bool = True
    attention_backend: Literal["auto", "torch_native", "flashinfer"] = "auto"
    """auto: flashinfer on a GPU that can have it, else torch_native."""
    cuda_graphs: bool = True
    """Replay decode steps on a GPU as one launch; without, the same kernels one by one."""
    grammar_backend: Literal["llguidance", "xgrammar"] = "llguidance"
    """Library that holds structured outputs to their definitions; the same on all workers."""
    num_threads: int | None = None
    """Compute threads, shared by the ranks of a host; None: every core this process may use."""
    seed: int = 0
    """Of dummy weights."""

    @property
    def ranks_per_node(self) -> int:
        """How many ranks are on each host."""
        return self.tensor_parallel_size // self.nodes
