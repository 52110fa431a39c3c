"""Which workers there are. So far: those that the settings name."""

from collections.abc import Sequence

from core.errors import ConfigError
from router.fleet.worker import Role


def static_members(prefill: Sequence[str], decode: Sequence[str]) -> dict[str, Role]:
    """Address to role, from two lists of host:port.

    Raises:
        ConfigError: no worker is named, or one is in both lists.
    """
    if not prefill and not decode:
        raise ConfigError("No worker is configured: set prefill, decode or both to host:port.")
    both = sorted(set(prefill) & set(decode))
    if both:
        raise ConfigError(f"{', '.join(both)} can't be both a prefill and a decode worker.")
    return dict.fromkeys(prefill, Role.PREFILL) | dict.fromkeys(decode, Role.DECODE)
