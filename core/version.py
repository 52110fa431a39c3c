"""Which Diptych this is."""

from importlib.metadata import PackageNotFoundError, version

PROTOCOL = 1
"""Number of the meaning of all messages in proto/, told at the start of every stream.

Raise it with each change that an older peer would misread, such as a field that moved. Routers and
workers of different numbers leave each other alone, so that a rolling update has two fleets side by
side instead of one that misunderstands itself.
"""


def installed_version() -> str:
    """As it was installed; "unknown" when run without having been."""
    try:
        return version("diptych")
    except PackageNotFoundError:
        return "unknown"
