"""What runs on a host where Ray placed a node of a worker: an actor that holds the node's process.

Ray's own process there imports `NodeActor`; the node itself is the command that a user would have
started by hand, in a process of its own. Invariant: no node outlives its actor. Settings, secrets
among them, reach the node in memory that only its descriptor names: never in a command line, the
environment or a file.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 20
_LINE_CHARS = 400


class NodeActor:
    """Holds one node; Ray gives it the resources that the node computes with."""

    def host(self) -> tuple[str, list[str]]:
        """Address of this host as Ray knows it, and the GPUs of it that Ray gave this actor."""
        import ray

        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        return ray.util.get_node_ip_address(), list(gpus)

    def run(self, role: str, settings: bytes, folder: str) -> tuple[int, str]:
        """Run the node until it ends.

        Secrets are told by this call and not when the actor is made: Ray keeps what makes an actor.

        Args:
            role: prefill or decode.
            settings: YAML of all its settings.
            folder: where it runs, if this host has one of that name; relative paths hold from here.

        Returns:
            Its exit status, negative if a signal ended it, and its last log lines.
        """
        fd = os.memfd_create("settings")
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(settings)
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.ray_node", str(os.getpid()), role, str(fd)],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=folder if os.path.isdir(folder) else None,
                env=node_environment(os.environ, role),
            )
        finally:
            os.close(fd)
        last: deque[str] = deque(maxlen=_LAST_LINES)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                last.append(line.rstrip("\n")[:_LINE_CHARS])
                sys.stderr.write(line)  # which Ray keeps among its logs
        return process.wait(), "\n".join(last)


def node_environment(ours: Mapping[str, str], role: str) -> dict[str, str]:
    """The host's own, without what Ray made of it and what would win over the leader's settings."""
    hidden = ("RAY_", f"DIPTYCH_{role.upper()}_", "PYTHONBREAKPOINT")
    return {name: value for name, value in ours.items() if not name.startswith(hidden)}


def main(argv: Sequence[str]) -> None:
    """Become the node, on the leash of its actor: argv is the actor's pid, the role, the fd."""
    actor, role, fd = argv
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(actor):
        sys.exit(1)  # it died before the leash held
    config = f"/proc/self/fd/{fd}"
    os.execv(sys.executable, [sys.executable, "-m", role, "--config", config])


if __name__ == "__main__":
    main(sys.argv[1:])
