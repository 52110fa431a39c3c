"""A checked request for text: its prompts, its sequences and the shape of its answer.

A dialect is what chats and completions do differently; everything else is written once, in
router/api/planning.py and router/api/generate.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.sampling import StructuredOutput
from router.access.caller import Caller
from router.api.answer import Answer, AnswerFacts, Usage
from router.api.choice import Choice, Prompt
from router.api.requests import TextRequest
from router.text.message import MessageParser
from router.text.processor import TextProcessor


class Dialect(Protocol):
    """What one of the two endpoints does its own way."""

    name: str
    """Label of its metrics."""
    id_prefix: str
    prompt_field: str
    """Field that errors about the prompt name."""

    def read(self, data: Mapping[str, Any], caller: Caller) -> TextRequest:
        """Check the fields of a body.

        Raises:
            InvalidRequestError: names the field that is wrong.
        """
        ...

    async def prompts(self, request: TextRequest, text: TextProcessor, room: int) -> list[Prompt]:
        """Make the prompts of a request that `read` returned.

        Args:
            request: the one.
            text: tokenizer and chat template.
            room: tokens of the context; a prompt that is far longer need not be complete.
        """
        ...

    def parser(
        self, request: TextRequest, prompt: Prompt, text: TextProcessor
    ) -> MessageParser | None:
        """Makes what parts the text of one output; None if all of it is content."""
        ...

    def default_max_tokens(self, configured: int) -> int | None:
        """The output's limit where the client set none; None for the rest of the context."""
        ...

    def structure(self, request: TextRequest, text: TextProcessor) -> StructuredOutput | None:
        """What an output must be; None for anything.

        Raises:
            InvalidRequestError: what was asked for can't be had together.
        """
        ...

    def aliases(self, request: TextRequest) -> list[str]:
        """The client's own names: none, one for all of it, or one for each prompt."""
        ...

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """Makes what writes the answer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request that passed every check."""

    request: TextRequest
    prompts: Sequence[Prompt]
    choices: Sequence[Choice]
    answer_id: str

    def named(self, aliases: Sequence[str]) -> dict[str, list[str]]:
        """Which sequences each of the client's names stands for."""
        share = len(self.choices) // max(1, len(aliases))
        names = [choice.request.request_id for choice in self.choices]
        return {alias: names[i * share : (i + 1) * share] for i, alias in enumerate(aliases)}

    def usage(self) -> Usage:
        """What the whole request has used so far."""
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.prompts),
            completion_tokens=sum(choice.output.num_tokens for choice in self.choices),
            cached_tokens=self._cached_tokens(),
            reasoning_tokens=self._reasoning_tokens(),
        )

    def mode(self) -> str:
        """How the sequences were served, as far as it is known."""
        ends = (choice.output.end for choice in self.choices)
        return ",".join(sorted({end.mode for end in ends if end is not None and end.mode}))

    def _reasoning_tokens(self) -> int:
        return sum(choice.output.num_reasoning for choice in self.choices)

    def _cached_tokens(self) -> int | None:
        """Of each prompt, what was cached before the request; None if that is not known.

        Its choices share what the first of them computes, so the least lucky one tells.
        """
        total = 0
        for prompt in self.prompts:
            ends = [choice.output.end for choice in self.choices if choice.prompt is prompt]
            known = [end.cached_tokens for end in ends if end is not None]
            if not known:
                return None
            total += min(known)
        return total
