"""What keeps the cached blocks of tenants apart: the salt that a request's block hashes start from.

The salt is a keyed digest of the tenant and of what the client itself asked to be kept apart by.
Its key is a secret of the deployment, the same on all its routers, so that nobody outside can
compute the hash of another tenant's block, nor look for tokens of their own that would hash to it:
xxh3 is fast, but no cryptographic hash, and owes its safety here to the secret at the start of
every chain.
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


def tenant_salt(secret: str | None) -> TenantSalt:
    """Under the deployment's secret; None: under one of this process alone."""
    if secret is None:
        _log.warning(
            "neither cache_secret nor auth_token is set: block hashes get a secret of this process "
            "alone, and other routers won't find what is cached for this one's callers"
        )
        return TenantSalt(secrets.token_bytes(32))
    return TenantSalt(secret.encode())
