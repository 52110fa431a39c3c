"""Workers that do not come so far as to serve: they end at once, and say why in one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cluster import make_worker
from tests.support.process import Process, alive, descendants, wait_until

START_S = 90.0


@contextmanager
def starting(model: Path, transport: str) -> Iterator[Process]:
    """A decode worker whose engine has begun to start."""
    worker = make_worker("decode", model, transport, {"device": "cpu"})
    with worker.stack:
        worker.start()
        assert worker.process is not None
        worker.process.wait_for_line("listening on", START_S)
        yield worker.process


def test_sigterm_while_the_engine_starts_ends_the_worker_at_once(slow_llama: Path) -> None:
    with starting(slow_llama, "tcp") as process:
        engine = wait_until(lambda: descendants(process.pid), 30, "the engine process")
        process.signal(signal.SIGTERM)
        assert process.wait(8) == 0, "it does not wait for an engine that has nothing to finish"
        assert not any(alive(pid) for pid in engine)
        assert "Traceback" not in process.log and "killing" not in process.log


def test_a_setting_that_can_not_be_is_told_of_in_one_line(tiny_llama: Path) -> None:
    with starting(tiny_llama, "gpu") as process:
        assert process.wait(START_S) == 1
        assert "kv_transport gpu moves device memory" in process.log
        assert "Traceback" not in process.log
