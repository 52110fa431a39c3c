"""POST /generate: prompts in, text and token ids out."""

from collections.abc import Mapping
from typing import Any

from router.api.answer import Answer, AnswerFacts
from router.api.completions import CompletionDialect
from router.api.native.answer import NativeAnswer
from router.api.native.request import NativeRequest, read_native
from router.api.requests import TextRequest


class NativeDialect(CompletionDialect):
    """Completions by other names."""

    name = "generate"
    id_prefix = "gen-"

    def read(self, data: Mapping[str, Any]) -> TextRequest:
        """Check the fields of a body."""
        return read_native(data)

    def aliases(self, request: TextRequest) -> list[str]:
        """The client's names, one per prompt."""
        assert isinstance(request, NativeRequest)
        return list(request.rids)

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """An answer in the endpoint's own shape."""
        assert isinstance(request, NativeRequest)
        return NativeAnswer(facts, request)
