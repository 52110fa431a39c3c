"""One choice's way from tokens to text.

Owns what is between a Generation and an answer: incremental decoding, stop ids and stop strings,
counting, and why the output ended. Used by one task; knows nothing of JSON or HTTP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.finish import FinishReason
from router.generation import GenerationEnd, Token
from router.text.detokeniser import Detokeniser
from router.text.message import MessageDelta, MessageParser
from router.text.stop_strings import StopStrings


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRules:
    """What of the output the client gets, the same for all choices of a request."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    """Stop strings and stop ids stay in the text."""
    stop_ids: frozenset[int] = frozenset()
    """Ids that end the output when sampled."""
    eos_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    """Stop strings are not looked for in the text of so many tokens."""
    logprobs: bool = False
    token_ids: bool = False
    discard: bool = False
    """No output is wanted: the first token, without which there is no prompt, is dropped."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token with logprobs and where its text starts in the output, in characters."""

    token: Token
    offset: int


@dataclass(slots=True)
class Piece(MessageDelta):
    """What a turn adds to the answer."""

    tokens: list[TokenText] = field(default_factory=list)
    """Empty unless logprobs were asked for."""
    token_ids: list[int] = field(default_factory=list)
    """Empty unless token ids were asked for."""

    def __bool__(self) -> bool:
        parts = self.content or self.reasoning or self.calls or self.tokens or self.token_ids
        return bool(parts)

    def append(self, other: "Piece") -> None:
        """Append a later piece."""
        self.extend(other)
        self.tokens += other.tokens
        self.token_ids += other.token_ids


_REASONS = {FinishReason.LENGTH: "length", FinishReason.ABORTED: "abort"}


class Output:
    """Consumes the tokens of one sequence."""

    def __init__(
        self,
        detokeniser: Detokeniser,
        rules: OutputRules,
        *,
        parser: MessageParser | None = None,
        offset: int = 0,
    ) -> None:
        """Start at the first token.

        Args:
            detokeniser: for this sequence only.
            rules: what the client gets.
            parser: finds reasoning and calls; None if all text is content.
            offset: characters that the answer has before the output, where it echoes the prompt.
        """
        self._detokeniser = detokeniser
        self._feed = detokeniser.feed
        self._rules = rules
        self._watching = bool(rules.stops)
        self._stops = StopStrings(rules.stops, include_match=rules.include_stop)
        self._parser = parser
        self._hidden = frozenset[int]() if rules.include_stop else rules.stop_ids
        self._recording = rules.logprobs or rules.token_ids
        self._chars = offset
        self.num_tokens = 0
        """Tokens taken, up to the one that ended the output."""
        self._num_undecided = 0
        self.num_reasoning = 0
        """Those that were reasoning, its markers included."""
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        """The stop string, or the stop id other than an end-of-sequence id, that ended it."""
        self.end: GenerationEnd | None = None
        """None while running."""

    @property
    def stopped(self) -> bool:
        """True once a stop string or the only wanted call came: no more tokens are wanted."""
        return self.finish_reason is not None

    def take(self, tokens: Sequence[Token]) -> Piece:
        """Take the tokens of one turn; those after a stop string are ignored."""
        piece = Piece()
        if self._rules.discard:
            self.finish_reason = "length"
            return piece
        feed, hidden = self._feed, self._hidden
        for token in tokens:
            self.num_tokens += 1
            token_id = token.token_id
            text = "" if token_id in hidden else feed(token_id)
            if self._recording:
                self._record(token, piece)
                self._chars += len(text)
            if self._watching:
                text = self._pass(text)
            if self._parser is None:
                piece.content += text
            else:
                self._parse(text, self._parser, piece)
            if self.finish_reason is not None:
                break
        return piece

    def close(self, end: GenerationEnd) -> Piece:
        """Take how the generation ended, after its last token or the one that stopped it."""
        self.end = end
        piece = Piece()
        if not self.stopped:
            text = self._detokeniser.finish()
            text = self._pass(text) + self._stops.flush()
            if self._parser is None:
                piece.content = text
            else:
                piece.extend(self._parser.feed(text))
        if not self.stopped:
            self.finish_reason = _REASONS.get(end.finish_reason, "stop")
            if end.matched_stop not in self._rules.eos_ids:
                self.stop_reason = end.matched_stop
        if self._parser is not None:
            piece.extend(self._parser.finish())
            if self._parser.num_calls and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        return piece

    def _parse(self, text: str, parser: MessageParser, piece: Piece) -> None:
        thinking = parser.thinking
        piece.extend(parser.feed(text))
        self._num_undecided += 1
        if thinking or parser.thinking:
            self.num_reasoning += self._num_undecided
        if not parser.undecided:
            self._num_undecided = 0
        if parser.complete:
            self.finish_reason = "tool_calls"

    def _pass(self, text: str) -> str:
        if not self._watching or not text or self.num_tokens <= self._rules.min_tokens:
            return text
        passed = self._stops.push(text)
        if passed.matched is not None:
            self.finish_reason, self.stop_reason = "stop", passed.matched
        return passed.text

    def _record(self, token: Token, piece: Piece) -> None:
        if self._rules.token_ids:
            piece.token_ids.append(token.token_id)
        if self._rules.logprobs and token.logprobs is not None:
            piece.tokens.append(TokenText(token, self._chars))
