"""One sequence's tokens on their way to the client.

Made by router/api/generate.py for each sequence, and given to its Generation, which calls `take`
where tokens arrive. Invariant: what can't be sent at once is kept, and no more is taken before
`catch_up` has sent it; so a client that reads slowly costs one turn of events, and one that keeps
up costs no task.

`take` runs per token of the whole fleet. Python 3.11 calls a function that is an instance's
attribute slowly, and one that a name was given first fast; hence the names.
"""

from collections.abc import Callable, Sequence

from core.clock import Clock
from router.access.allowance import Allowance
from router.api.choice import Choice
from router.api.metrics import TokenTimer
from router.api.output import Piece
from router.api.sse import EventStream
from router.generation import GenerationEnd, Token

Render = Callable[[Piece], bytes]
"""Takes a piece of a choice's output; returns the events to send of it now, if any."""


class Delivery:
    """See the module."""

    def __init__(
        self,
        choice: Choice,
        render: Render,
        opening: Callable[[], bytes],
        stream: EventStream,
        timer: TokenTimer,
        clock: Clock,
        allowance: Allowance | None,
    ) -> None:
        """`opening` makes the events that come before those of the first piece."""
        self.timer = timer
        self._output = choice.output
        self._render = render
        self._opening: Callable[[], bytes] | None = opening
        self._stream = stream
        self._clock = clock
        self._allowance = allowance
        self._unsent = b""
        self._num_unsent = 0

    def take(self, tokens: Sequence[Token]) -> bool:
        """Send what tokens add to the output; see router.generation.Take."""
        if self._allowance is not None:
            self._allowance.take_output(len(tokens))
        output, clock, render = self._output, self._clock, self._render
        now = clock()
        piece = output.take(tokens)
        if piece.content or piece:
            events = render(piece) if self._opening is None else self._first(piece)
            if events and not self._stream.write_now(events, now):
                self._unsent, self._num_unsent = events, len(tokens)
                return False
        self.timer.arrived(now, len(tokens))
        return output.finish_reason is None

    async def catch_up(self) -> None:
        """Send what was kept, however long the client takes."""
        if self._unsent:
            await self._stream.write(self._unsent)
            self.timer.arrived(self._clock(), self._num_unsent)
            self._unsent = b""

    async def close(self, end: GenerationEnd) -> None:
        """Send what the output held back."""
        piece = self._output.close(end)
        if piece and (events := self._first(piece)):
            await self._stream.write(events)

    def opening(self) -> bytes:
        """The events before the first piece, unless they were sent with one."""
        opening, self._opening = self._opening, None
        return b"" if opening is None else opening()

    def _first(self, piece: Piece) -> bytes:
        return self.opening() + self._render(piece)
