"""Entry of every process that the launcher starts: a `diptych` command that dies with its parent.

`python -m diptych.cluster.child PARENT_PID COMMAND ...`. However the launcher ends, SIGKILL
included, the kernel then kills this process; what it started itself notices its closed pipe.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from diptych.cli import main as run_command

_PR_SET_PDEATHSIG = 1
"""Source: prctl(2)."""


def die_with(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent ends; on Linux only.

    Raises:
        SystemExit: the parent is gone already.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise SystemExit("the launcher ended before this process began")


def main(argv: Sequence[str]) -> int:
    """Run the command after the parent's pid; returns the exit status."""
    die_with(int(argv[0]))
    return run_command(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
