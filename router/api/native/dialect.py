"""POST /generate: prompts in, text and token ids out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from router.access.caller import Caller
from router.api.answer import Answer, AnswerFacts
from router.api.choice import Prompt
from router.api.completions import CompletionDialect
from router.api.native.answer import NativeAnswer
from router.api.native.request import NativeRequest, read_native
from router.api.prompt_scores import check_start
from router.api.requests import TextRequest
from router.text.processor import TextProcessor


class NativeDialect(CompletionDialect):
    """Completions by other names."""

    name = "generate"
    id_prefix = "gen-"

    def read(self, data: Mapping[str, Any], caller: Caller) -> TextRequest:
        """Check the fields of a body."""
        return read_native(data)

    async def prompts(self, request: TextRequest, text: TextProcessor, room: int) -> list[Prompt]:
        """Tokenize what is text, and note what is asked for each prompt."""
        prompts = await super().prompts(request, text, room)
        assert isinstance(request, NativeRequest)
        for prompt in prompts:
            check_start(request.scores_from, prompt.token_ids)
        if not request.each:
            return prompts
        pairs = zip(prompts, request.each, strict=True)
        return [replace(prompt, request=own) for prompt, own in pairs]

    def aliases(self, request: TextRequest) -> list[str]:
        """The client's names, one per prompt."""
        assert isinstance(request, NativeRequest)
        return list(request.rids)

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """An answer in the endpoint's own shape."""
        assert isinstance(request, NativeRequest)
        return NativeAnswer(facts, request)
