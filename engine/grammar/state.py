"""Follows one output through its grammar. Owned by its SequenceState; the engine's thread calls it.

Invariant: the matcher has accepted exactly the first `num_accepted` ids of the output. So the state
is a function of the grammar and the output alone, and another worker that is given both goes on as
this one would have.

A mask is computed when it is read. In a step that was planned ahead that is after the step before
has ended, which tells the token that the mask depends on: by then the device computes the logits
that the mask is for, so nobody waits for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from core.errors import DiptychError, InvalidRequestError
from engine.grammar.backend import GrammarFailure, Matcher, Words, num_words
from engine.grammar.budget import MaskBudget
from engine.grammar.compiler import Ticket

if TYPE_CHECKING:
    from engine.plan import TokenMask

PendingToken = Callable[[], int | None]
"""The sequence's token of the step in flight, waited for; None if that step failed."""


class OutputGrammar:
    """The grammar of one output and how far the output is in it."""

    def __init__(
        self,
        ticket: Ticket,
        *,
        output_ids: Sequence[int],
        end_ids: Sequence[int],
        min_tokens: int,
        vocab_size: int,
        pending_token: PendingToken,
        budget: MaskBudget | None = None,
    ) -> None:
        """Begin with an output that may have grown already.

        Args:
            ticket: of the grammar.
            output_ids: the sequence's own list, which grows.
            end_ids: ids that end the output.
            min_tokens: those ids are not allowed before so many tokens, unless nothing else is.
            vocab_size: of the model.
            pending_token: asked when a mask is needed for the token after it.
            budget: what its masks may cost; default: of its own.
        """
        self.ticket = ticket
        self.num_accepted = 0
        self._error: DiptychError | None = None
        self._error_position = 0
        self._output_ids = output_ids
        self._end_ids = np.array(end_ids, np.int64)
        self._min_tokens = min_tokens
        self._num_words = num_words(vocab_size)
        self._pending_token = pending_token
        self._budget = budget or MaskBudget()
        self._matcher: Matcher | None = None

    @property
    def begun(self) -> bool:
        """True once there can be masks."""
        return self._matcher is not None

    def begin(self) -> None:
        """Take the grammar; its ticket is settled.

        Raises:
            DiptychError: there is none.
        """
        self._matcher = self.ticket.grammar().start()

    def mask(self, position: int) -> "TokenMask":
        """Which tokens may be at `position` of the output, at most one past what is known then."""
        return _Mask(self, position)

    def words(self, position: int) -> Words:
        """Compute that mask, [ceil(vocab_size / 32)]."""
        words = np.full(self._num_words, -1, np.int32)
        if self._error is None:
            try:
                news = self._news(position)
                if news is not None:
                    work = partial(self._fill, news, words)
                    self._budget.spend(work, max(1, len(news)))
                    if position < self._min_tokens:
                        self._forbid_ends(words)
            except (GrammarFailure, InvalidRequestError) as error:
                self._error = (
                    DiptychError(f"The structured output can't go on: {error}")
                    if isinstance(error, GrammarFailure)
                    else error
                )
                self._error_position = position
                words.fill(-1)
        return words

    def error_at(self, position: int) -> DiptychError | None:
        """Why the token sampled at `position` must not be used, if so: its mask allowed anything.

        A step planned ahead may have met the error that the token before it knows nothing of.
        """
        return self._error if position >= self._error_position else None

    def _news(self, position: int) -> list[int] | None:
        """The output up to `position` that is not accepted yet; None if it never gets there."""
        news = list(self._output_ids[self.num_accepted : position])
        if self.num_accepted + len(news) < position:
            token_id = self._pending_token()
            if token_id is None:
                return None
            news.append(token_id)
        assert self.num_accepted + len(news) == position, "an output shrank, or skipped a token"
        return news

    def _fill(self, news: list[int], words: Words) -> None:
        """Accept more of the output, and write which tokens may follow."""
        assert self._matcher is not None, "planned before its grammar had begun"
        if news:
            self._matcher.accept(news)
            self.num_accepted += len(news)
        self._matcher.fill(words)

    def _forbid_ends(self, words: Words) -> None:
        rest = words.copy()
        bits = (np.int64(1) << (self._end_ids % 32)).astype(np.uint32)
        np.bitwise_and.at(rest.view(np.uint32), self._end_ids // 32, ~bits)
        if rest.any():
            words[:] = rest


class _Mask:
    """Implements TokenMask."""

    __slots__ = ("_grammar", "_position", "_words")

    def __init__(self, grammar: OutputGrammar, position: int) -> None:
        self._grammar = grammar
        self._position = position
        self._words: Words | None = None

    def words(self) -> Words:
        if self._words is None:
            self._words = self._grammar.words(self._position)
        return self._words
