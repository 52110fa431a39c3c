"""Entry of a decode worker's engine process; started by its service process."""

import sys

from decode.importer import build_importer
from decode.settings import DecodeSettings
from worker.engine_process import pipe_fd, run_engine

if __name__ == "__main__":
    sys.exit(run_engine(pipe_fd(sys.argv), DecodeSettings, build_importer))
