"""Compiles definitions off the engine's thread and keeps what was compiled.

The engine asks for a Ticket and goes on with other sequences until that is settled. Invariants: at
most MAX_QUEUED definitions wait for the threads, at most MAX_KEPT are kept, and every ticket is
settled within COMPILE_TIMEOUT_S, whatever the library does.
"""

import logging
import queue
import threading
from collections import OrderedDict
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress

from core.clock import Clock, monotonic
from core.errors import DiptychError, InvalidRequestError, OverloadedError
from core.sampling import StructuredOutput
from engine.grammar.backend import CompiledGrammar, GrammarBackend

COMPILE_TIMEOUT_S = 10.0
NUM_THREADS = 2
MAX_QUEUED = 64
MAX_KEPT = 256
_STACK_BYTES = 512 << 20
"""Address space, of which only what is used takes memory. The libraries recurse from rule to rule:
a chain of rules in the longest definition takes some 150 MiB, and with 8 the process would end."""
_Job = tuple[StructuredOutput, "Future[CompiledGrammar]"]


class Ticket:
    """A grammar that is there, or will be, or won't."""

    __slots__ = ("_clock", "_deadline", "_future")

    def __init__(self, future: "Future[CompiledGrammar]", deadline: float, clock: Clock) -> None:
        self._future = future
        self._deadline = deadline
        self._clock = clock

    @property
    def settled(self) -> bool:
        """True if `grammar` answers at once, and always the same."""
        return self._future.done() or self._clock() >= self._deadline

    def grammar(self) -> CompiledGrammar:
        """The grammar, once settled.

        Raises:
            InvalidRequestError: there is none for that definition, or it takes too long.
            OverloadedError: its turn never came.
        """
        if self._future.done():
            return self._future.result()
        if self._future.running():
            raise InvalidRequestError(
                f"The structured output was not compiled within {COMPILE_TIMEOUT_S:.0f} s; "
                "simplify its definition.",
                param="structured",
            )
        raise OverloadedError("Too many definitions of structured output wait to be compiled.")

    def wait(self, timeout_s: float) -> bool:
        """Wait until settled, or the time is over. For callers with nothing else to do."""
        with suppress(FutureTimeoutError):
            self._future.exception(max(0.0, min(timeout_s, self._deadline - self._clock())))
        return self.settled


class GrammarCompiler:
    """Tickets for definitions. One thread calls it."""

    def __init__(
        self,
        backend: GrammarBackend,
        *,
        clock: Clock = monotonic,
        num_threads: int = NUM_THREADS,
    ) -> None:
        """Args: without threads nothing is compiled but by `compile_next`."""
        self._backend = backend
        self._num_threads = num_threads
        self._clock = clock
        self._log = logging.getLogger(__name__)
        self._jobs: queue.Queue[_Job] = queue.Queue(MAX_QUEUED)
        self._threads: list[threading.Thread] = []
        self._kept: OrderedDict[StructuredOutput, Future[CompiledGrammar]] = OrderedDict()

    def ticket(self, structured: StructuredOutput) -> Ticket:
        """Begin to compile, unless the same definition is there or under way.

        Raises:
            OverloadedError: too many wait already.
        """
        future = self._kept.get(structured)
        if future is None:
            future = Future()
            try:
                self._jobs.put_nowait((structured, future))
            except queue.Full:
                raise OverloadedError(
                    f"{MAX_QUEUED} definitions of structured output wait to be compiled already; "
                    "try again later or on another worker."
                ) from None
            self._kept[structured] = future
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            self._staff()
        self._kept.move_to_end(structured)
        return Ticket(future, self._clock() + COMPILE_TIMEOUT_S, self._clock)

    def compile_next(self) -> None:
        """Settle the definition that waits longest, or wait for one. Threads do nothing else."""
        structured, future = self._jobs.get()
        future.set_running_or_notify_cancel()
        try:
            grammar = self._backend.compile(structured)
        except DiptychError as error:
            future.set_exception(error)
        except Exception as error:
            self._log.exception("a %s failed to compile", structured.kind)
            reason = f"{type(error).__name__}: {error}"
            future.set_exception(DiptychError(f"The structured output failed: {reason}"))
        else:
            future.set_result(grammar)

    def _staff(self) -> None:
        # Daemons, since nobody can end a compile that hangs; an executor would wait for it at exit.
        if len(self._threads) < self._num_threads:
            name = f"grammar-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._work, name=name, daemon=True))
            usual = threading.stack_size(_STACK_BYTES)
            try:
                self._threads[-1].start()
            finally:
                threading.stack_size(usual)

    def _work(self) -> None:
        while True:
            self.compile_next()
