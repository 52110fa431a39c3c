"""POST /v1/completions: what completions do their own way."""

from collections.abc import Mapping
from typing import Any

from core.sampling import StructuredOutput
from router.access.caller import Caller
from router.api.answer import Answer, AnswerFacts
from router.api.choice import Prompt
from router.api.completion_answer import CompletionAnswer
from router.api.requests import CompletionRequest, TextRequest, read
from router.text.message import MessageParser
from router.text.processor import TextProcessor


class CompletionDialect:
    """Prompts in, text out."""

    name = "completions"
    id_prefix = "cmpl-"
    prompt_field = "prompt"

    def read(self, data: Mapping[str, Any], caller: Caller) -> TextRequest:
        """Check the fields of a body."""
        return read(CompletionRequest, data)

    async def prompts(self, request: TextRequest, text: TextProcessor, room: int) -> list[Prompt]:
        """Tokenize the prompts that are text."""
        assert isinstance(request, CompletionRequest)
        return [await _prompt(prompt, request, text, room) for prompt in request.prompt]

    def parser(
        self, request: TextRequest, prompt: Prompt, text: TextProcessor
    ) -> MessageParser | None:
        """All text is content."""
        return None

    def structure(self, request: TextRequest, text: TextProcessor) -> StructuredOutput | None:
        """What was asked for."""
        return request.structured

    def aliases(self, request: TextRequest) -> list[str]:
        """The client's own name of the request, if it gave one."""
        return [request.rid] if request.rid else []

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """An answer in the endpoint's own shape."""
        assert isinstance(request, CompletionRequest)
        return CompletionAnswer(facts, request)

    def default_max_tokens(self, configured: int) -> int | None:
        """A short answer, as in OpenAI's API."""
        return configured


async def _prompt(
    prompt: str | tuple[int, ...], request: CompletionRequest, text: TextProcessor, room: int
) -> Prompt:
    if isinstance(prompt, str):
        ids = await text.encode(prompt, add_special_tokens=request.add_special_tokens, room=room)
        return Prompt(token_ids=ids, echo=prompt if request.echo else "", continued=True)
    echo = ""
    if request.echo and all(0 <= token_id < 2**32 for token_id in prompt):
        echo = text.decode(prompt, skip_special_tokens=request.skip_special_tokens)
    return Prompt(token_ids=prompt, echo=echo, continued=True)
