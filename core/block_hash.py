"""Identity of KV blocks: a chain of hashes over the tokens that a block and its ancestors hold.

Router and engine must agree bit for bit, so both call this and nothing else. Two blocks have the
same hash only if all tokens up to their end, and everything else that shapes KV, are the same.
"""

from array import array
from collections.abc import Sequence
from struct import Struct
from sys import byteorder

import xxhash

HASH_BYTES = 16


def root_hash(model_digest: bytes, *, lora_id: str = "", salt: str = "") -> bytes:
    """Hash that the first block of a chain starts from.

    Args:
        model_digest: digest of weights and configuration, as the worker describes it.
        lora_id: adapter name, empty for the base model.
        salt: tenant salt; different salts never share blocks.

    Returns:
        HASH_BYTES bytes.
    """
    parts = [model_digest, lora_id.encode(), salt.encode()]
    framed = b"".join(len(part).to_bytes(4, "little") + part for part in parts)
    return xxhash.xxh3_128_digest(framed)


def hash_blocks(
    token_ids: Sequence[int], block_size: int, parent: bytes, *, start: int = 0
) -> list[bytes]:
    """Hash the full blocks of `token_ids[start:]`; a partial last block has no hash.

    Args:
        token_ids: token ids, [T], each below 2**32.
        block_size: tokens per block.
        parent: hash of the block before `start`, or the root hash.
        start: index to begin at, a multiple of `block_size`.

    Returns:
        One hash of HASH_BYTES bytes per full block, in order.
    """
    tokens = array("I", token_ids[start:] if start else token_ids)
    if byteorder == "big":
        tokens.byteswap()
    # Of all ways to cut the tokens this is the fastest, and a long prompt has thousands of blocks.
    num_blocks = len(tokens) // block_size
    blocks = Struct(f"{block_size * tokens.itemsize}s").iter_unpack(
        memoryview(tokens)[: num_blocks * block_size]
    )
    return [parent := xxhash.xxh3_128_digest(parent + block) for (block,) in blocks]


def pack_hashes(hashes: Sequence[bytes]) -> bytes:
    """Concatenate hashes for the wire."""
    return b"".join(hashes)


def unpack_hashes(packed: bytes) -> list[bytes]:
    """Split what `pack_hashes` made.

    Raises:
        ValueError: the length is not a multiple of HASH_BYTES.
    """
    if len(packed) % HASH_BYTES:
        raise ValueError(f"{len(packed)} bytes are not a whole number of {HASH_BYTES}-byte hashes")
    return [packed[i : i + HASH_BYTES] for i in range(0, len(packed), HASH_BYTES)]
