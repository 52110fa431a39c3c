"""Runs commands that may hang, and reads the figures that other engines print.

A figure is a line of JSON with `bench` in it, as `{"peer": "vllm 0.26.0", "bench": "decode_step",
"batch": 1, "seconds": 0.0068}`; all other output is passed over.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

_FIELDS = {
    "offline": ("seconds", "output_tokens", "tokens_per_s"),
    "decode_step": ("batch", "seconds"),
    "prefill": ("tokens", "seconds"),
}
_GRACE_S = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A command that is over."""

    code: int
    seconds: float
    timed_out: bool
    output: str
    """Standard output; with `merged`, errors too."""

    @property
    def trouble(self) -> str:
        """Why not to trust it; empty if all went well."""
        if self.timed_out:
            return f"ended after {self.seconds:.0f} s, its time limit"
        return f"ended with code {self.code}" if self.code else ""


def run(command: str | Sequence[str], *, timeout_s: float, merged: bool = False) -> Ended:
    """Run to the end or to the time limit, then end whatever it started.

    Args:
        command: words, or a line for the shell.
        timeout_s: after which it is killed.
        merged: take errors into the output instead of showing them.
    """
    begun = time.monotonic()
    timed_out = False
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            shell=isinstance(command, str),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if merged else None,
            start_new_session=True,
        )
        try:
            child.wait(max(0.0, timeout_s))
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            # What it leaves behind would hold the GPU's memory.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(_GRACE_S)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(
        code=child.returncode,
        seconds=time.monotonic() - begun,
        timed_out=timed_out,
        output=text,
    )


def figures(output: str) -> list[dict[str, Any]]:
    """The figures in a peer's output; lines that are none are passed over."""
    found = []
    for line in output.splitlines():
        if not line.lstrip().startswith("{"):
            continue
        try:
            figure = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(figure, dict) and isinstance(figure.get("bench"), str):
            fields = _FIELDS.get(figure["bench"])
            if fields and all(_is_number(figure.get(name)) for name in fields):
                found.append({"peer": "peer", **figure})
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf
