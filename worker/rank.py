"""Entry of the process of a worker's rank above 0: its share of each step and of KV that moves.

Started by rank 0, which is the worker's engine process; on other nodes by their service process,
which adds the host at which peers find the blocks of this rank.
"""

import sys
from functools import partial

from engine.parallel.rank import pipe_fd, run_rank
from kvtransfer.rank_service import RankService

if __name__ == "__main__":
    host = sys.argv[2] if len(sys.argv) > 2 else None
    sys.exit(run_rank(pipe_fd(sys.argv[:2]), partial(RankService, host=host)))
