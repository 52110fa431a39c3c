"""What it costs, in seconds, to send a prompt to a worker: one pure function per term.

Every function takes the numbers of all workers at once, float64 arrays of shape [workers] unless it
says otherwise, and returns the term for each of them. Called by choose.py, which adds terms up by
name, so that a decision can be explained. Invariant: no term is negative, and more load, fewer
cached tokens or a slower rate never make one smaller.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.fleet.worker import Distance

Column = NDArray[np.float64]

EXPECTED_OUTPUT_TOKENS = 128.0
"""Output length assumed until some were seen, where a request allows more: most end sooner.

Source: own judgement; only the ratio of decode to prefill terms depends on it.
"""


SHARED_COST = 10.0
"""Seconds of somebody's waiting that a second of computing is worth avoiding, over its own second.

Source: benchmarks/placement_simulator.py, conversation trace. From 0 to 10 hits rise from 0.78 to
0.95 of what one infinite cache has, and TTFT falls; above, prompts wait too long for their cache.
"""

ASSUMED_HOST_BYTES_PER_S = 10e9
"""Rate of copies from host memory to the device until any worker has measured its own.

Source: own judgement, half of what PCIe 4 carries over 16 lanes.
"""

DISTANCE_RATIO = {
    Distance.UNKNOWN: 1.0,
    Distance.HOST: 1.0,
    Distance.RACK: 0.5,
    Distance.ZONE: 0.25,
    Distance.APART: 0.1,
}
"""Part of the assumed rate that a link over some distance is taken to have.

Source: own judgement; it only counts until the link was measured.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSettings:
    """Values assumed until measured."""

    prefill_tokens_per_s: float
    decode_step_s: float
    transfer_bytes_per_s: float
    """Of a link within one host, or between workers that do not say where they are."""

    def assumed_rate(self, distance: Distance) -> float:
        """Bytes per second of a link that was not measured."""
        return self.transfer_bytes_per_s * DISTANCE_RATIO[distance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What placement needs to know of a request."""

    num_tokens: int
    """Prompt and output of earlier attempts: what must be in KV before decode goes on."""
    max_new_tokens: int
    recomputed: bool = False
    """True if no cache can spare any of it."""

    @property
    def total_tokens(self) -> int:
        """Longest that the sequence can get."""
        return self.num_tokens + self.max_new_tokens


def cached_tokens(prompt: Prompt, matched_blocks: Column, block_size: Column) -> Column:
    """Tokens that need not be computed; at least one always is."""
    return np.minimum(matched_blocks * block_size, prompt.num_tokens - 1)


def backlog_s(idle_at: Column, now: float) -> Column:
    """Until the worker has computed the prompts that it has."""
    return np.maximum(0.0, idle_at - now)


def prefill_s(uncached_tokens: Column, tokens_per_s: Column) -> Column:
    """To compute what is not cached."""
    return uncached_tokens / tokens_per_s


def crowding_s(
    own_prefill_s: Column, queued_s: Column, arrivals_per_s: float, popularity: float
) -> Column:
    """What computing this prompt costs the prompts that come after it.

    Prompts that arrive while the worker is busy all wait longer by what this one takes. And a
    prefix that is computed where it was not cached takes room from others, and draws its next
    request away from where the rest of it is. Without this term every prompt is served soonest,
    and the fleet computes the same prefixes everywhere. A prefix that many ask for, such as a
    system prompt, is worth having in several places, so that these share what it costs.

    Args:
        own_prefill_s: what this prompt takes.
        queued_s: what is to be computed before it.
        arrivals_per_s: prompts that one prefill worker is sent per second.
        popularity: recent requests for the longest prefix that is cached anywhere.
    """
    shared = SHARED_COST / (1 + popularity)
    return own_prefill_s * (shared + arrivals_per_s * (queued_s + own_prefill_s))


def host_copy_s(blocks: Column, block_bytes: Column, bytes_per_s: Column) -> Column:
    """To copy cached blocks from host memory back to the device."""
    return blocks * block_bytes / bytes_per_s


def transfer_bytes(uncached_tokens: Column, block_size: Column, block_bytes: Column) -> Column:
    """KV that the decode worker does not hold, and would have to read."""
    blocks: Column = np.ceil(uncached_tokens / block_size)
    return blocks * block_bytes


def transfer_s(kv_bytes: Column, bytes_per_s: Column) -> Column:
    """To move KV over a link."""
    return kv_bytes / bytes_per_s


def decode_s(tokens: float, step_s: Column, batch: Column, places: Column) -> Column:
    """To generate; a fuller batch makes each step slower, up to twice at a full one."""
    fullness: Column = np.minimum(1.0, batch / places)
    return tokens * step_s * (1 + fullness)


def batch_wait_s(generation_s: Column, batch: Column, places: Column) -> Column:
    """To wait for a place in the batch: its share of one more generation."""
    over: Column = np.maximum(0.0, batch + 1 - places)
    return generation_s * over / places


def kv_wait_s(generation_s: Column, needed_blocks: Column, free_blocks: Column) -> Column:
    """To wait for KV blocks: the missing part of them, of one more generation.

    Args:
        generation_s: what one generation takes.
        needed_blocks: by the end of the output.
        free_blocks: left once what runs there has grown as predicted; infinite if unknown.
    """
    missing: Column = np.clip(1 - free_blocks / np.maximum(needed_blocks, 1), 0.0, 1.0)
    return generation_s * missing


def growth_blocks(batch: Column, output_tokens: float, block_size: Column) -> Column:
    """Blocks that running sequences will yet fill, each half of its output on average."""
    return batch * (output_tokens / 2) / block_size


def stall_s(gap_s: Column, batch: Column) -> Column:
    """What computing prompts costs the sequences that decode there: each waits for `gap_s`."""
    return gap_s * batch
