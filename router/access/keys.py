"""API keys: how they are made, how they are kept, how the file of them is read.

A key is 256 random bits, so it can't be guessed from its SHA-256. A slow hash would protect nothing
more; it would only let a flood of wrong keys occupy the router. The file holds digests alone.
Looking a key up compares under a secret of this process, so that how long it takes says nothing of
the digests that are there.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from core.errors import ConfigError
from router.access.caller import Caller
from router.admission import Priority

PREFIX = "dk-"
"""Lets people and secret scanners recognise a key of this project."""
_KEY_BYTES = 32
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$"
_CLASSES = {each.name.lower(): each for each in Priority}


class KeyEntry(BaseModel):
    """One entry of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=_NAME)
    hash: str
    tenant: str | None = Field(None, pattern=_NAME)
    """Whose it is; default: its own name, so that it shares nothing."""
    models: tuple[str, ...] | None = Field(None, min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)
    priority: str = "normal"
    admin: bool = False

    @field_validator("hash")
    @classmethod
    def _checked_hash(cls, value: str) -> str:
        if _HASH.fullmatch(value) is None:
            raise ValueError(
                "must be sha256: and 64 hexadecimal digits, as `diptych keys new` makes it"
            )
        return value

    @field_validator("priority")
    @classmethod
    def _checked_priority(cls, value: str) -> str:
        if value not in _CLASSES:
            raise ValueError(f"must be one of {', '.join(_CLASSES)}")
        return value

    @property
    def limited(self) -> bool:
        """True if there is a limit to how much it may do."""
        limits = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)
        return any(limit is not None for limit in limits)

    def caller(self) -> Caller:
        """Whoever bears this key."""
        priority = _CLASSES[self.priority]
        return Caller(
            name=self.name,
            tenant=self.tenant or self.name,
            admin=self.admin,
            models=None if self.models is None else frozenset(self.models),
            priority=priority,
            best_priority=priority,
        )


class Keys:
    """The keys that are let in."""

    def __init__(self, entries: Sequence[KeyEntry]) -> None:
        self.entries = tuple(entries)
        self._secret = secrets.token_bytes(32)
        self._by_digest = {
            self._blinded(bytes.fromhex(entry.hash.removeprefix("sha256:"))): entry
            for entry in entries
        }

    def find(self, key: bytes) -> KeyEntry | None:
        """The entry of a key that a client sent; None if it is unknown."""
        return self._by_digest.get(self._blinded(hashlib.sha256(key).digest()))

    def _blinded(self, digest: bytes) -> bytes:
        # Whoever can't compute this learns nothing from which of its bytes a comparison stops at.
        return hmac.digest(self._secret, digest, "sha256")


def new_key() -> str:
    """A fresh key."""
    return PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def hash_of(key: str) -> str:
    """What the file holds of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def read_keys(text: str, where: str) -> Keys:
    """Read a file of keys; no message shows what it holds.

    Args:
        text: YAML, a list of entries.
        where: name of the file, for messages.

    Raises:
        ConfigError: says which entry is wrong, and how.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where} is not valid YAML{line}.") from None
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{where} must be a list of at least one key, as `- name: ...`.")
    try:
        entries = TypeAdapter(tuple[KeyEntry, ...]).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place, *field = first["loc"] or (0,)
        number = int(place) + 1 if isinstance(place, int) else 1
        name = f".{field[0]}" if field else ""
        reason = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where}: key {number}{name}: {reason}.") from None
    for field_name in ("name", "hash"):
        seen: set[str] = set()
        for number, entry in enumerate(entries, 1):
            value = getattr(entry, field_name)
            if value in seen:
                raise ConfigError(f"{where}: key {number} has a {field_name} that another one has.")
            seen.add(value)
    return Keys(entries)
