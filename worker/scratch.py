"""Blocks for a probe of a link: set aside in the engine as for a prompt that nobody ever sent.

Used by both roles. Invariant: they are neither served from the prefix cache nor enter it.
"""

import secrets

from core.block_hash import HASH_BYTES
from core.sampling import SamplingParams
from engine.request import EngineRequest


def scratch_request(request_id: str, num_blocks: int, block_size: int) -> EngineRequest:
    """What to reserve for that many blocks; the reservation is to be cancelled, never adopted."""
    return EngineRequest(
        request_id=request_id,
        prompt_ids=[0] * (num_blocks * block_size),
        sampling=SamplingParams(max_tokens=1),
        # Random, so that no cached block is taken for one of these.
        block_hashes=[secrets.token_bytes(HASH_BYTES) for _ in range(num_blocks)],
    )
