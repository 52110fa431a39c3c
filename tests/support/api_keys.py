"""API keys for tests."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from router.access.keys import Keys, hash_of, new_key, read_keys


class KeyRing:
    """Fresh keys by name, and the file that lets them in."""

    def __init__(self, **entries: Mapping[str, object]) -> None:
        self.plain = {name: new_key() for name in entries}
        self.text = yaml.safe_dump(
            [
                {"name": name, "hash": hash_of(self.plain[name]), **entry}
                for name, entry in entries.items()
            ]
        )

    @property
    def keys(self) -> Keys:
        return read_keys(self.text, "keys.yaml")

    def bearer(self, name: str) -> dict[str, str]:
        """Headers of a request with the key of that name."""
        return {"authorization": f"Bearer {self.plain[name]}"}

    def write(self, path: Path) -> Path:
        path.write_text(self.text)
        return path
