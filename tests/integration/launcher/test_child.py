"""Children of the launcher die with it, whatever ends it."""

import os
import signal
import sys
from contextlib import suppress

from tests.support.process import alive, descendants, running, wait_until

LAUNCHER = """
import os, subprocess, sys, signal
code = (
    "import signal, sys; from diptych.cluster.child import die_with; "
    "die_with(int(sys.argv[1])); print('tied', flush=True); signal.pause()"
)
parent = sys.argv[1] if len(sys.argv) > 1 else str(os.getpid())
subprocess.Popen([sys.executable, "-c", code, parent], start_new_session=True)
signal.pause()
"""


def test_child_dies_when_its_parent_is_killed() -> None:
    with running([sys.executable, "-c", LAUNCHER]) as launcher:
        launcher.wait_for_line("tied", 10)
        (child,) = descendants(launcher.pid)
        launcher.popen.kill()
        try:
            wait_until(lambda: not alive(child), 5, "the child to end")
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)


def test_child_whose_parent_is_gone_already_does_not_start() -> None:
    with running([sys.executable, "-c", LAUNCHER, "1"]) as launcher:
        launcher.wait_for_line("the launcher ended", 10)
        wait_until(lambda: not any(map(alive, descendants(launcher.pid))), 5, "the child to end")
        assert "tied" not in launcher.log
