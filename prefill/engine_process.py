"""Entry of a prefill worker's engine process; started by its service process."""

import sys

from prefill.exporter import build_exporter
from prefill.settings import PrefillSettings
from worker.engine_process import pipe_fd, run_engine

if __name__ == "__main__":
    sys.exit(run_engine(pipe_fd(sys.argv), PrefillSettings, build_exporter))
