"""What keeps the cached blocks of tenants apart: the salt that a request's block hashes start from.

The salt is a keyed digest of the tenant and of what the client itself asked to be kept apart by. Its
key is a secret of the deployment, the same on all its routers, so that nobody outside can compute the
hash of another tenant's block, nor look for tokens of their own that would hash to it: xxh3 is fast,
but no cryptographic hash, and owes its safety here to the secret that every chain starts from.
"""

import hmac
import logging
import secrets

_log = logging.getLogger(__name__)
_PURPOSE = b"diptych salt of block hashes, version 1"


class TenantSalt:
    """Salts under one secret."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: of any length; only what is derived from it is kept."""
        self._key = hmac.digest(secret, _PURPOSE, "sha256")

    def of(self, tenant: str, asked: str) -> str:
        """The salt of a request.

        Args:
            tenant: whose it is; empty where there are no keys, and then `asked` is all.
            asked: what the client set.
        """
        if not tenant:
            return asked
        framed = f"{len(tenant)}:{tenant}{asked}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, framed, "sha256").hex()


def tenant_salt(secret: str | None, auth_token: str | None, *, keyed: bool) -> TenantSalt:
    """From what the operator set.

    Args:
        secret: the setting for this; else the token that all processes share serves.
        auth_token: of gRPC.
        keyed: there are API keys, so salts are needed.
    """
    shared = secret or auth_token
    if shared is None:
        if keyed:
            _log.warning(
                "neither cache_secret nor auth_token is set: block hashes get a secret of this "
                "process, and other routers won't find what is cached for this one's callers"
            )
        return TenantSalt(secrets.token_bytes(32))
    return TenantSalt(shared.encode())
