"""Runs kubectl and helm against the server."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.kube.server import environment

DEADLINE_S = 60.0


@dataclass(frozen=True)
class Program:
    """A command line client and who it is."""

    path: Path
    kubeconfig: Path

    def run(self, *words: str, text: str = "") -> "subprocess.CompletedProcess[str]":
        """Whatever comes of it."""
        return subprocess.run(
            [str(self.path), *words],
            env=environment(self.kubeconfig),
            input=text,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )

    def __call__(self, *words: str, text: str = "") -> str:
        """What it prints; fails if it does."""
        done = self.run(*words, text=text)
        assert done.returncode == 0, f"{self.path.name} {' '.join(words)}: {done.stderr}"
        return done.stdout

    def json(self, *words: str) -> Any:
        """What it prints with `-o json`."""
        return json.loads(self(*words, "-o", "json"))

    def refusal(self, *words: str, text: str = "") -> str:
        """Why it fails."""
        done = self.run(*words, text=text)
        assert done.returncode != 0, done.stdout
        return done.stderr
