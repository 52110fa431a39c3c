"""Seals transport metadata with the workers' shared token. Used by the transports of libraries.

A library parses what its peer sent, so those bytes must come from a holder of the token: nothing
else reaches its parser. Invariant: `open_sealed` returns only what `seal` was given.
"""

import hashlib
import hmac

from core.errors import TransferError

_SEAL_BYTES = hashlib.sha256().digest_size


def seal(content: bytes, token: bytes) -> bytes:
    """The content behind a proof that its maker knows the token."""
    return _proof(content, token) + content


def open_sealed(metadata: bytes, token: bytes, *, library: str, peer_id: str) -> bytes:
    """What `seal` was given.

    Args:
        metadata: as they came from the peer.
        token: shared secret; empty where there is none.
        library: whose metadata they should be, for the error.
        peer_id: whose they are, for the error.

    Raises:
        TransferError: they are another transport's, or the peer has another token.
    """
    proof, content = metadata[:_SEAL_BYTES], metadata[_SEAL_BYTES:]
    if not hmac.compare_digest(proof, _proof(content, token)):
        raise TransferError(
            f"The transport metadata of peer {peer_id} are not {library}'s, or were sealed with "
            "another token; give both workers the same."
        )
    return content


def _proof(content: bytes, token: bytes) -> bytes:
    return hmac.digest(token, content, "sha256")
