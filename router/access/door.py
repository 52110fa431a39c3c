"""The door of the HTTP side: which key a request bears, and whether that opens the path it wants.

Made by router/main.py and asked by router/app.py before any endpoint runs. Invariant: with keys, no
endpoint but those of probes sees a request of unknown origin; no message or log line holds a key.
"""

import binascii
import secrets
from base64 import b64decode
from collections.abc import Mapping

from core.clock import Clock, monotonic
from router.access.allowance import Allowance, Limits
from router.access.caller import ANYONE, Access, Caller
from router.access.keys import KeyEntry, Keys
from router.access.salt import TenantSalt
from router.api.errors import Headers, HttpError

MAX_KEY_BYTES = 512
"""Nothing longer is looked up."""
_BEARER: Headers = [(b"www-authenticate", b'Bearer realm="diptych"')]
_BASIC: Headers = [(b"www-authenticate", b'Basic realm="diptych", charset="UTF-8"')]


class Door:
    """Lets requests in."""

    def __init__(
        self, keys: Keys | None, *, salt: TenantSalt | None = None, clock: Clock = monotonic
    ) -> None:
        """Let in whoever bears one of some keys.

        Args:
            keys: None lets everyone in.
            salt: keeps cached blocks of tenants apart; default: under a secret of its own.
            clock: the router's monotonic clock, the one that deadlines are on.
        """
        self.salt = salt or TenantSalt(secrets.token_bytes(32))
        self.clock = clock
        self._keys: Keys | None = None
        self._callers: dict[str, Caller] = {}
        self._allowances: dict[str, Allowance] = {}
        if keys is not None:
            self.change(keys)

    def change(self, keys: Keys) -> None:
        """Use other keys from now on; who is known under the same limits keeps what is left."""
        known, self._allowances = self._allowances, {}
        for entry in keys.entries:
            limits = _limits(entry)
            if entry.limited:
                before = known.get(entry.name)
                same = before is not None and before.limits == limits
                allowance = before if same else Allowance(entry.name, limits, self.clock)
                assert allowance is not None
                self._allowances[entry.name] = allowance
        self._callers = {entry.name: entry.caller() for entry in keys.entries}
        self._keys = keys

    def admit(self, headers: Mapping[bytes, bytes], access: Access) -> Caller:
        """Who sent a request.

        Args:
            headers: of the request, names in lower case.
            access: what its path asks for.

        Raises:
            HttpError: 401 without a known key, 403 if the key does not open this path.
        """
        if self._keys is None or access is Access.OPEN:
            return ANYONE
        challenge = _BASIC if access is Access.PAGE else _BEARER
        sent = _key_of(headers)
        if not sent:
            raise HttpError(
                401,
                "invalid_api_key",
                "No API key was sent. Send it as the header `Authorization: Bearer KEY`.",
                headers=challenge,
            )
        entry = self._keys.find(sent) if len(sent) <= MAX_KEY_BYTES else None
        if entry is None:
            raise HttpError(
                401,
                "invalid_api_key",
                "The API key is not one of this router's. Ask whoever runs it for a key.",
                headers=challenge,
            )
        caller = self._callers[entry.name]
        if access is not Access.KEY and not caller.admin:
            raise forbidden(caller, "is for keys with `admin: true`")
        return caller

    def allowance(self, caller: Caller) -> Allowance | None:
        """What a caller has left; None if there is no limit."""
        return self._allowances.get(caller.name) if caller.name else None


def forbidden(caller: Caller, what: str, *, param: str | None = None) -> HttpError:
    """A 403 for something that the caller's key does not allow."""
    message = f"This {what}; the key {caller.name!r} does not allow it."
    return HttpError(403, "permission_denied", message, param=param)


def _limits(entry: KeyEntry) -> Limits:
    return Limits(
        requests_per_minute=entry.requests_per_minute,
        tokens_per_minute=entry.tokens_per_minute,
        max_concurrent=entry.max_concurrent,
    )


def _key_of(headers: Mapping[bytes, bytes]) -> bytes:
    """The key that a request bears; empty without."""
    scheme, _, value = headers.get(b"authorization", b"").strip().partition(b" ")
    match scheme.lower():
        case b"bearer":
            return value.strip()
        case b"basic" if not _crosses_sites(headers):
            try:
                return b64decode(value.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
    return headers.get(b"x-api-key", b"").strip()


def _crosses_sites(headers: Mapping[bytes, bytes]) -> bool:
    """True if another site's page may have made a browser send what it has remembered."""
    if headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
        return True
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")
