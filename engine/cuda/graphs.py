"""Decode steps as CUDA graphs, one for each of a ladder of batch sizes.

A step runs on the next size up; rows of padding write no K and V, attend to one token of block 0
and draw a token that nobody reads. Without graphs the same kernels run on the same padded rows, so
that outputs are bit-equal either way.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.cuda.attention import CudaContext, DecodeAttention, FlashInferAttention
from engine.cuda.inputs import StepInputs


def batch_ladder(max_rows: int) -> list[int]:
    """Sizes that are captured: 1, 2, 4, 8, 16, 24, 32, then every 16, and `max_rows`."""
    sizes = [size for size in (1, 2, 4, 8, 16, 24, *range(32, max_rows, 16)) if size < max_rows]
    return [*sizes, max_rows]


@dataclass(slots=True)
class _Rung:
    attention: DecodeAttention
    context: CudaContext
    logits: torch.Tensor | None = None
    graph: torch.cuda.CUDAGraph | None = None


class DecodeSteps:
    """Runs steps in which every sequence has one token."""

    def __init__(
        self,
        *,
        compute: Callable[[StepInputs, CudaContext, int], torch.Tensor],
        inputs: StepInputs,
        attention: FlashInferAttention,
        cos_sin: torch.Tensor,
        max_rows: int,
        capture: bool,
    ) -> None:
        """Prepare every size.

        Args:
            compute: runs the model and draws a token for each row: (inputs, context, rows) ->
                logits [rows, vocab_size]. Queues kernels and nothing else.
            inputs: whose addresses the graphs read.
            attention: over the pool.
            cos_sin: see `prepare_qkv_`.
            max_rows: the largest size.
            capture: False runs kernel by kernel.
        """
        self._compute = compute
        self._inputs = inputs
        self._capture = capture
        self._sizes = batch_ladder(max_rows)
        self._rungs = {}
        for size in self._sizes:
            decode = attention.decodes(size, inputs)
            context = CudaContext(
                parts=decode.parts,
                cos_sin=cos_sin,
                positions=inputs.device_positions[:size],
                slots=inputs.device_slots[:size],
                output_rows=None,
            )
            self._rungs[size] = _Rung(decode, context)

    @property
    def sizes(self) -> list[int]:
        """Ascending."""
        return self._sizes

    def padded(self, rows: int) -> int:
        """The size on which a step of `rows` sequences runs."""
        return self._sizes[bisect_left(self._sizes, rows)]

    def capture_all(self, progress: Callable[[str], None]) -> None:
        """Record every size, the largest first, so that the others fit into its memory."""
        if not self._capture:
            return
        progress(f"capturing {len(self._sizes)} CUDA graphs")
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for size in reversed(self._sizes):
            rung = self._rungs[size]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels, fills the libraries' workspaces
                self.rehearse(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                rung.logits = _borrow(self._compute(self._inputs, rung.context, size))
            rung.graph = graph
        torch.cuda.synchronize()

    def rehearse(self, size: int) -> None:
        """Run a step of nothing but padding, kernel by kernel."""
        self._fill_with_padding(size)
        self.plan(size)
        self._compute(self._inputs, self._rungs[size].context, size)

    def plan(self, size: int) -> None:
        """Have attention plan the step whose inputs are sent: `size` rows, padding included."""
        inputs = self._inputs
        self._rungs[size].attention.plan(inputs.table_starts[: size + 1], inputs.last_lens[:size])

    def run(self, size: int) -> torch.Tensor:
        """Queue the step that was planned. Returns its logits, [size, vocab_size]."""
        rung = self._rungs[size]
        if rung.graph is None:
            return self._compute(self._inputs, rung.context, size)
        rung.graph.replay()
        assert rung.logits is not None
        return rung.logits

    def close(self) -> None:
        """Free the graphs. NCCL does not leave a group while a graph holds its collectives."""
        for rung in self._rungs.values():
            rung.logits = None
            if rung.graph is not None:
                rung.graph.reset()
        self._rungs.clear()

    def _fill_with_padding(self, size: int) -> None:
        inputs = self._inputs
        inputs.reuse()
        pad_rows(inputs, 0, size, num_blocks=0)
        inputs.send(size)
        inputs.sent()


def pad_rows(inputs: StepInputs, first: int, size: int, num_blocks: int) -> int:
    """Write rows [first, size) of padding. Returns the entries of `block_ids` then in use."""
    rows = slice(first, size)
    inputs.token_ids[rows] = 0
    inputs.source_rows[rows] = -1
    inputs.positions[rows] = 0
    inputs.slots[rows] = -1
    inputs.seeds[rows] = 0
    inputs.draw_positions[rows] = 0
    inputs.temperatures[rows] = 0.0
    inputs.last_lens[rows] = 1
    count = size - first
    inputs.block_ids[num_blocks : num_blocks + count] = 0
    inputs.table_starts[first] = num_blocks
    inputs.table_starts[first + 1 : size + 1] = range(num_blocks + 1, num_blocks + count + 1)
    return num_blocks + count


def _borrow(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without keeping it from the next graph, which runs only later."""
    integers = tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
    return torch.as_tensor(_Memory(integers), device=tensor.device).view(tensor.dtype)


class _Memory:
    """What torch needs to know of memory that it is not to own."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.dtype.itemsize}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
