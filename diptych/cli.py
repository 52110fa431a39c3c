"""The `diptych` command: picks the part that a subcommand names and hands it the rest.

A part is imported only when it is called, so that the router starts without torch and `--help`
needs nothing but the standard library.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata
from typing import cast

Main = Callable[[Sequence[str]], int]


@dataclass(frozen=True, slots=True)
class _Command:
    module: str
    """Where `main(argv) -> exit status` is."""
    extras: str
    """What the part needs besides the plain package, as pip names it."""
    summary: str


COMMANDS: dict[str, _Command] = {
    "serve": _Command(
        "diptych.cluster.main", "router,worker", "a whole cluster on this machine, ready to use"
    ),
    "router": _Command("router.main", "router", "the HTTP endpoint in front of the workers"),
    "prefill": _Command("prefill.main", "worker", "a worker that computes prompts"),
    "decode": _Command("decode.main", "worker", "a worker that generates tokens"),
    "keys": _Command("diptych.keys", "router", "make API keys for the HTTP endpoint"),
    "plan": _Command(
        "diptych.planning.main", "router", "how many workers a load needs to meet an SLO"
    ),
    "autoscale": _Command(
        "diptych.autoscale.main", "router,k8s", "scale the pools of a Kubernetes deployment"
    ),
    "doctor": _Command("diptych.doctor.main", "router", "look for what is wrong with a deployment"),
    "bench": _Command(
        "diptych.bench.main", "router", "load an endpoint: throughput, latencies, goodput"
    ),
    "chat": _Command("diptych.chat.main", "router", "talk to an endpoint in the terminal"),
}

_OURS = frozenset(
    {"core", "telemetry", "rpc", "engine", "kvtransfer", "worker", "prefill", "decode", "router"}
    | {"diptych"}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if name in ("-V", "--version"):
        print(f"diptych {_version()}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean `diptych {near[0]}`?" if near else "See `diptych --help`."
        print(f"diptych: there is no command {name!r}. {hint}", file=sys.stderr)
        return 2
    try:
        module = import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _OURS:
            raise
        print(_missing(name, command, error), file=sys.stderr)
        return 2
    return cast(Main, module.main)(words[1:])


def _version() -> str:
    try:
        return metadata.version("diptych")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: diptych COMMAND [--SETTING VALUE ...]",
            "",
            "Serves large language models with prefill and decode in separate worker pools.",
            "",
            *lines,
            "",
            "`diptych COMMAND --help` explains every setting.",
            "`diptych --version` says the version.",
        ]
    )


def _missing(name: str, command: _Command, error: ModuleNotFoundError) -> str:
    return (
        f"diptych {name}: the Python package {error.name!r} is not installed. "
        f"Install what this command needs: pip install 'diptych[{command.extras}]'"
    )
