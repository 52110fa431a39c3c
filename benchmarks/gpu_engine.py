"""The engine on one GPU beside that GPU's own limits and, if you like, other engines.

    python -m benchmarks.gpu_engine [--save] [--peer COMMAND]... [limits offline steps steady]

Each part runs in a process of its own, so that nothing but what is timed holds the GPU's memory,
and is ended at its time limit. Parts:

    limits   device-to-device copy of 2 GiB, 8192^3 bf16 product; always run
    offline  Qwen3-0.6B, 256 requests at once, lengths of seed 0
    steps    Llama-3.1-8B: decode steps over 4096 tokens at batch 1 and 64, prefill of 8192 tokens
    steady   both models with all sequences under way: GPU idle share, time per kind of kernel

A peer is a command for the shell that prints figures as lines of JSON (see benchmarks.children);
in it, {models} stands for a folder with a config.json in a folder for each of gpu_shapes.SHAPES.
`--order` says who runs when: A is ours (offline and steps), B all peers. The file is written anew
after each part, so a session that is cut short leaves what it has.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import children
from benchmarks.gpu_shapes import SHAPES
from benchmarks.gpu_summary import Summary
from benchmarks.gpu_workloads import WORKLOADS
from benchmarks.report import RESULTS, Report

PARTS = ("limits", "offline", "steps", "steady")
PART_LIMIT_S, PEER_LIMIT_S, DEADLINE_S = 240.0, 300.0, 570.0
_TAIL = 3000


class Session:
    """Children one after another, and what they found so far."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._deadline: float = time.monotonic() + arguments.deadline
        self._limits: list[dict[str, Any]] = []
        self._models: dict[str, list[dict[str, Any]]] = {}
        self._peers: list[dict[str, Any]] = []
        self.troubles: list[str] = []
        for name, shape in SHAPES.items():
            shape.write(folder / "models" / name)

    def run(self) -> None:
        """All rounds; the profiles with the first."""
        wanted = self._arguments.parts
        for who in self._arguments.order:
            if who == "B":
                for command in self._arguments.peer:
                    self._peer(command)
                continue
            self._ours(self._limits, "limits", self._limits_command())
            for name in self._arguments.models:
                parts = [part for part in ("offline", "steps") if part in wanted]
                # After what is timed, since a process that was profiled is slower.
                if "steady" in wanted and name not in self._models:
                    parts.append("steady")
                self._model(name, parts)

    def report(self) -> Report:
        """The figures so far."""
        arguments = self._arguments
        gpu = self._limits[0]["gpu"] if self._limits else {}
        name = "-".join(["gpu-engine", *_short_name(gpu.get("name", "none")), *arguments.suffix])
        settings = {
            key: getattr(arguments, key) for key in ("parts", "models", "order", "repeats", "peer")
        }
        report = Report(name, settings, gpu=gpu, quiet=True)
        summary = Summary(report)
        if self._limits:
            summary.limits(self._limits)
            for model, rounds in self._models.items():
                summary.model(model, rounds)
            summary.peers([line for peer in self._peers for line in peer["figures"]])
        if self._peers:
            report.details["peers"] = self._peers
        if self.troubles:
            report.details["troubles"] = self.troubles
        return report

    def _model(self, name: str, wanted: Sequence[str]) -> None:
        work = WORKLOADS[name]
        can = {"offline": work.offline, "steps": work.decode_batches, "steady": work.steady}
        parts = [part for part in wanted if can[part]]
        if not parts:
            return
        arguments = self._arguments
        command = [sys.executable, "-m", "benchmarks.gpu_parts", name, *parts]
        command += ["--device", arguments.device, "--repeats", str(arguments.repeats)]
        self._ours(self._models.setdefault(name, []), f"{name} {' '.join(parts)}", command)

    def _limits_command(self) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.gpu_limits"]
        command += ["--device", self._arguments.device, "--shrink", str(self._arguments.shrink)]
        return command

    def _ours(self, into: list[dict[str, Any]], what: str, command: list[str]) -> None:
        file = self._folder / "part.json"
        file.unlink(missing_ok=True)
        print(f"== {what}", flush=True)
        ended = children.run(
            [*command, "--json", str(file)], timeout_s=self._left(self._arguments.part_limit)
        )
        self._note(what, ended.trouble, f"{ended.seconds:.0f} s")
        if file.exists():
            into.append(json.loads(file.read_text()))
        self._save()

    def _peer(self, command: str) -> None:
        line = command.replace("{models}", str(self._folder / "models"))
        print(f"== {command}", flush=True)
        ended = children.run(line, timeout_s=self._left(self._arguments.peer_limit), merged=True)
        found = children.figures(ended.output)
        trouble = ended.trouble or ("" if found else "printed no figure")
        self._note(command, trouble, f"{ended.seconds:.0f} s, {len(found)} figures")
        if trouble:
            print(ended.output[-_TAIL:], flush=True)
        if model := _model_in(command):
            found = [{**figure, "model": model} for figure in found]
        self._peers.append({"command": command, "seconds": ended.seconds, "figures": found})
        self._save()

    def _note(self, what: str, trouble: str, went: str) -> None:
        print(f"   {went} {trouble}".rstrip(), flush=True)
        if trouble:
            self.troubles.append(f"{what} {trouble}")

    def _save(self) -> None:
        if self._arguments.out is not None and self._limits:
            self.report().save(self._arguments.out)

    def _left(self, limit_s: float) -> float:
        return min(limit_s, self._deadline - time.monotonic())


def _short_name(gpu: str) -> list[str]:
    """As h100 of NVIDIA H100 80GB HBM3."""
    words = [word.lower() for word in gpu.split() if word.upper() not in ("NVIDIA", "TESLA")]
    return words[:1]


def _model_in(command: str) -> str | None:
    found = re.search(r"\{models\}/([\w.-]+)", command)
    return found[1] if found and found[1] in SHAPES else None


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; none means all")
    parser.add_argument("--peer", action="append", default=[], help="a command of another engine")
    parser.add_argument("--order", help="who runs when; ABA with peers, else A")
    parser.add_argument(
        "--model",
        action="append",
        choices=WORKLOADS,
        dest="models",
        help="repeatable; default: qwen3-0.6b and llama-3.1-8b",
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each timed run, per round")
    parser.add_argument("--part-limit", type=float, default=PART_LIMIT_S, help="seconds per part")
    parser.add_argument("--peer-limit", type=float, default=PEER_LIMIT_S, help="seconds per peer")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, help="seconds for all")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results")
    parser.add_argument("--out", type=Path, help="write into this folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the limits' sizes, for tests")
    arguments = parser.parse_args(words)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    arguments.order = arguments.order or ("ABA" if arguments.peer else "A")
    if set(arguments.order) - set("AB"):
        parser.error("--order is made of A and B")
    some = arguments.parts and set(arguments.parts) != set(PARTS)
    arguments.suffix = sorted(set(arguments.parts) - {"limits"}) if some else []
    arguments.parts = arguments.parts or list(PARTS)
    arguments.models = arguments.models or ["qwen3-0.6b", "llama-3.1-8b"]
    if arguments.save:
        arguments.out = arguments.out or RESULTS
    return arguments


def main() -> int:
    """Measure, print, save."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        session = Session(arguments, Path(folder))
        session.run()
    report = session.report()
    report.show()
    if arguments.out is not None and report.figures:
        print(f"saved {report.save(arguments.out)}")
    print(*session.troubles, sep="\n")
    return bool(session.troubles)


if __name__ == "__main__":
    sys.exit(main())
