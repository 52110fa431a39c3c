"""Which Diptych this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """As it was installed; "unknown" when run without having been."""
    try:
        return version("diptych")
    except PackageNotFoundError:
        return "unknown"
