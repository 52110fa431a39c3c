"""The numbers of a step: written by the host into pinned memory, brought to the device by one copy.

Addresses never change, so CUDA graphs can read them. Invariant: the host writes only after the copy
before has been made (`StepInputs.reuse` waits for it; that copy is among the first things a step
does, so the wait is over when the step before has been waited for).
"""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from engine.cuda.events import QueuePoint

Int32s = npt.NDArray[np.int32]

_TOKEN_AREAS: Final = ("token_ids", "source_rows", "positions", "slots")
_ROW_AREAS: Final = ("output_rows", "draw_positions", "table_starts", "last_lens")


class StepInputs:
    """Room for steps of up to `max_tokens` tokens of up to `max_rows` sequences."""

    def __init__(
        self, *, max_tokens: int, max_rows: int, max_blocks: int, device: torch.device
    ) -> None:
        """Reserve.

        Args:
            max_tokens: in a step.
            max_rows: sequences in a step.
            max_blocks: entries of all their block tables together.
            device: of the mirror.
        """
        sizes = [("seeds", 2 * max_rows), ("temperatures", max_rows)]
        sizes += [(name, max_tokens) for name in _TOKEN_AREAS]
        sizes += [(name, max_rows + 1) for name in _ROW_AREAS]
        sizes += [("block_ids", max_blocks)]
        total = sum(size for _, size in sizes)
        self._pinned = torch.zeros(total, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._mirror = torch.zeros(total, dtype=torch.int32, device=device)
        self._copied = QueuePoint(device)
        host: dict[str, Int32s] = {}
        mirror: dict[str, torch.Tensor] = {}
        start = 0
        for name, size in sizes:
            host[name] = self._pinned[start : start + size].numpy()
            mirror[name] = self._mirror[start : start + size]
            start += size
        self._num_fixed = total - max_blocks
        self.token_ids = host["token_ids"]
        self.source_rows = host["source_rows"]
        """Row of the step before whose sampled token goes in place of token_ids; -1: none."""
        self.positions = host["positions"]
        self.slots = host["slots"]
        self.output_rows = host["output_rows"]
        self.draw_positions = host["draw_positions"]
        self.seeds = host["seeds"].view(np.int64)
        self.temperatures = host["temperatures"].view(np.float32)
        self.block_ids = host["block_ids"]
        self.table_starts = host["table_starts"]
        self.last_lens = host["last_lens"]
        self.device_token_ids = mirror["token_ids"]
        self.device_source_rows = mirror["source_rows"]
        self.device_positions = mirror["positions"]
        self.device_slots = mirror["slots"]
        self.device_output_rows = mirror["output_rows"]
        self.device_draw_positions = mirror["draw_positions"]
        self.device_seeds = mirror["seeds"].view(torch.int64)
        self.device_temperatures = mirror["temperatures"].view(torch.float32)
        self.device_block_ids = mirror["block_ids"]
        self.device_table_starts = mirror["table_starts"]
        self.device_last_lens = mirror["last_lens"]

    def reuse(self) -> None:
        """Wait until what was written before has reached the device."""
        self._copied.wait()

    def send(self, num_blocks: int) -> None:
        """Bring everything over, of `block_ids` the first `num_blocks`. Does not wait."""
        used = self._num_fixed + num_blocks
        self._mirror[:used].copy_(self._pinned[:used], non_blocking=True)

    def sent(self) -> None:
        """Say that every copy of this step out of pinned memory has been queued."""
        self._copied.record()
