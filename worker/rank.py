"""Entry of the process of a worker's rank above 0: its share of each step and of KV that moves.

Started by rank 0, which is the worker's engine process.
"""

import sys

from engine.parallel.rank import pipe_fd, run_rank
from kvtransfer.rank_service import RankService

if __name__ == "__main__":
    sys.exit(run_rank(pipe_fd(sys.argv), RankService))
