"""Where sequences get their grammars. Owned by `Engine`, which asks once per step.

A sequence that waits for its grammar is live, and the scheduler passes it over. Invariant: each
live sequence with a grammar is known here until that has begun, or the sequence has ended.
"""

from functools import partial

from core.errors import DiptychError, InvalidRequestError
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.state import OutputGrammar
from engine.in_flight import StepsInFlight
from engine.sequence import SequenceState


class GrammarDesk:
    """Gives out grammars to the sequences of one engine."""

    def __init__(
        self, compiler: GrammarCompiler | None, in_flight: StepsInFlight, vocab_size: int
    ) -> None:
        """Args: without a compiler there is no structured output."""
        self._compiler = compiler
        self._in_flight = in_flight
        self._vocab_size = vocab_size
        self._waiting: dict[str, SequenceState] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_news(self) -> bool:
        """True if `take` would return something."""
        return any(map(_is_settled, self._waiting.values()))

    def ask(self, sequence: SequenceState) -> None:
        """Have the grammar of a new sequence compiled, if it wants one.

        Raises:
            InvalidRequestError: there are none on this engine.
            OverloadedError: too many are to be compiled already.
        """
        structured = sequence.sampling.structured
        if structured is None:
            return
        if self._compiler is None:
            raise InvalidRequestError(
                "This worker serves no structured output; its log of the start says why.",
                param="structured",
            )
        sequence.grammar = OutputGrammar(
            self._compiler.ticket(structured),
            output_ids=sequence.output_ids,
            end_ids=sequence.end_ids,
            min_tokens=sequence.sampling.min_tokens,
            vocab_size=self._vocab_size,
            pending_token=partial(self._in_flight.token_of, sequence),
        )

    def wait(self, sequence: SequenceState) -> None:
        """The sequence is live from now on."""
        if sequence.grammar is not None:
            self._waiting[sequence.request_id] = sequence

    def leave(self, sequence: SequenceState) -> None:
        """The sequence has ended; no-op if it does not wait."""
        if sequence.grammar is not None:
            self._waiting.pop(sequence.request_id, None)

    def take(self) -> list[tuple[SequenceState, DiptychError | None]]:
        """Sequences that wait no longer: they can go on, or never will for the reason given."""
        taken: list[tuple[SequenceState, DiptychError | None]] = []
        for sequence in [s for s in self._waiting.values() if _is_settled(s)]:
            del self._waiting[sequence.request_id]
            try:
                assert sequence.grammar is not None
                sequence.grammar.begin()
            except DiptychError as error:
                taken.append((sequence, error))
            else:
                taken.append((sequence, None))
        return taken

    def await_news(self, timeout_s: float) -> None:
        """Wait for one of them, for a caller with nothing else to do."""
        for sequence in self._waiting.values():
            if sequence.grammar is not None:
                sequence.grammar.ticket.wait(timeout_s)
                return


def _is_settled(sequence: SequenceState) -> bool:
    return sequence.grammar is not None and sequence.grammar.ticket.settled
