"""Entry of a rank whose side sends back what it is sent, with the rank and its blocks' bytes."""

import sys
import threading

from core.errors import TransferError
from engine.kv.pool import KVPool
from engine.parallel.rank import pipe_fd, run_rank
from engine.parallel.side import SideChannel


class Echo:
    def __init__(self, rank: int, pool: KVPool, channel: SideChannel) -> None:
        self._prefix = f"{rank} {pool.layout.block_bytes} ".encode()
        self._channel = channel
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._channel.interrupt()
        self._thread.join(5)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while (message := self._channel.receive(None)) is not None:
            if message == b"fail":
                self._channel.fail(TransferError("the side has had enough"))
            self._channel.send(self._prefix + message)


if __name__ == "__main__":
    sys.exit(run_rank(pipe_fd(sys.argv), Echo))
