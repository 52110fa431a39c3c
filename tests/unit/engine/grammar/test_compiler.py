"""Compiling on threads of its own: what is kept, what is bounded, what has a deadline."""

import threading
from collections.abc import Iterator

import pytest

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from engine.grammar.backend import CompiledGrammar
from engine.grammar.compiler import COMPILE_TIMEOUT_S, MAX_KEPT, GrammarCompiler
from tests.support.engine import FakeClock
from tests.support.grammar import BAD, RuleBackend, structure

WAIT_S = 10.0


class GatedBackend(RuleBackend):
    """Waits inside `compile` until it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.gate = threading.Event()

    def compile(self, structured: StructuredOutput) -> CompiledGrammar:
        self.begun.release()
        assert self.gate.wait(WAIT_S)
        return super().compile(structured)


@pytest.fixture
def backend() -> Iterator[GatedBackend]:
    backend = GatedBackend()
    yield backend
    backend.gate.set()


def test_who_asks_does_not_wait_and_the_same_definition_is_compiled_once(
    backend: GatedBackend,
) -> None:
    compiler = GrammarCompiler(backend)
    first, again = compiler.ticket(structure(5)), compiler.ticket(structure(5))
    assert backend.begun.acquire(timeout=WAIT_S)
    assert not first.settled and not again.settled
    backend.gate.set()
    assert first.wait(WAIT_S) and again.wait(WAIT_S)
    assert first.grammar() is again.grammar() is compiler.ticket(structure(5)).grammar()
    assert backend.compiled == [structure(5)]


def test_one_that_takes_long_does_not_hold_up_the_next(backend: GatedBackend) -> None:
    compiler = GrammarCompiler(backend, num_threads=2)
    slow, quick = compiler.ticket(structure(5)), compiler.ticket(structure(6))
    for _ in range(2):
        assert backend.begun.acquire(timeout=WAIT_S)
    backend.gate.set()
    assert slow.wait(WAIT_S) and quick.wait(WAIT_S)


def test_one_that_takes_too_long_is_refused_and_what_comes_of_it_is_kept(
    backend: GatedBackend,
) -> None:
    clock = FakeClock()
    compiler = GrammarCompiler(backend, clock=clock)
    ticket = compiler.ticket(structure(5))
    assert backend.begun.acquire(timeout=WAIT_S)
    assert not ticket.wait(0.0)
    clock.now += COMPILE_TIMEOUT_S
    assert ticket.settled
    with pytest.raises(InvalidRequestError, match="simplify"):
        ticket.grammar()
    later = compiler.ticket(structure(5))
    backend.gate.set()
    assert later.wait(WAIT_S)
    assert later.grammar() is not None
    assert backend.compiled == [structure(5)]


def test_refusals_are_kept_too(backend: GatedBackend) -> None:
    compiler = GrammarCompiler(backend)
    backend.gate.set()
    for _ in range(2):
        ticket = compiler.ticket(BAD)
        assert ticket.wait(WAIT_S)
        with pytest.raises(InvalidRequestError, match="no such rule"):
            ticket.grammar()
    assert backend.compiled == [BAD]


def test_the_definition_that_was_asked_for_longest_ago_is_forgotten() -> None:
    backend = RuleBackend()
    compiler = GrammarCompiler(backend, num_threads=0)

    def ask(length: int) -> None:
        if not compiler.ticket(structure(length)).settled:
            compiler.compile_next()

    for length in range(MAX_KEPT):
        ask(length)
    ask(0)
    ask(MAX_KEPT)
    assert len(backend.compiled) == MAX_KEPT + 1
    ask(0)
    assert len(backend.compiled) == MAX_KEPT + 1
    ask(1)
    assert len(backend.compiled) == MAX_KEPT + 2
