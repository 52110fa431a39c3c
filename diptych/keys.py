"""`diptych keys new`: makes an API key, shows it once, and shows the entry that lets it in."""

import sys
from collections.abc import Sequence
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from core.settings import load_or_exit
from router.access.keys import KeyEntry, hash_of, new_key

_USAGE = """usage: diptych keys new --name NAME [--SETTING VALUE ...]

Makes an API key and shows it once. `diptych keys new --help` explains every setting."""


class NewKeySettings(BaseModel):
    """Make an API key: the key itself goes to standard error, its entry to standard output.

    So `diptych keys new --name NAME >> keys.yaml` shows you the key and adds its entry.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        pattern=KeyEntry.model_fields["name"].metadata[0].pattern,
        description="Name of the key in logs and limits: letters, digits, and _ . @ -.",
    )
    tenant: str | None = Field(
        None,
        pattern=KeyEntry.model_fields["name"].metadata[0].pattern,
        description="Who it belongs to. Keys of one tenant share cached prompts, turns in the "
        "queue, and the sight of each other's requests. Default: a tenant of its own.",
    )
    models: tuple[str, ...] | None = Field(
        None, description="Models that it may use, separated by commas; default: every one."
    )
    requests_per_minute: int | None = Field(None, ge=1, description="Most requests a minute.")
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Most tokens a minute, prompts and outputs together."
    )
    max_concurrent: int | None = Field(None, ge=1, description="Most requests at once.")
    priority: Literal["high", "normal", "low"] = Field(
        "normal", description="The most urgent class that its requests may have, and their default."
    )
    admin: bool = Field(
        False, description="It may also see and do what concerns everybody: metrics, fleet, flush."
    )


def main(argv: Sequence[str]) -> int:
    """Run a verb; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] != "new":
        print(f"diptych keys: there is no verb {argv[0]!r}; there is `new`.", file=sys.stderr)
        return 2
    settings = load_or_exit(
        NewKeySettings, argv[1:], prog="diptych keys new", env_prefix="DIPTYCH_KEYS_"
    )
    key = new_key()
    given = settings.model_dump(mode="json", exclude_defaults=True)
    entry = {"name": given.pop("name"), "hash": hash_of(key), **given}
    print(f"The key; it is shown this once:\n\n  {key}\n", file=sys.stderr)
    print("Its entry for the file of --api-keys:\n", file=sys.stderr, flush=True)
    print(yaml.safe_dump([entry], sort_keys=False, allow_unicode=True), end="")
    return 0
