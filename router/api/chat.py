"""POST /v1/chat/completions: what chats do their own way."""

import asyncio
from collections.abc import Mapping
from typing import Any

from core.errors import InvalidRequestError
from core.sampling import StructuredOutput
from router.access.caller import Caller
from router.api.answer import Answer, AnswerFacts
from router.api.calls_or_answer import calls_or_answer
from router.api.chat_answer import ChatAnswer
from router.api.choice import Prompt
from router.api.requests import ChatRequest, ConversationFields, TextRequest, read
from router.api.tools import check_choice
from router.text.message import MessageParser
from router.text.processor import TextProcessor
from router.text.reasoning import ReasoningSplit, begins_in_reasoning
from router.text.tools.call_list import CallListParser

INLINE_MESSAGES = 32
"""More messages and tools are rendered in a thread: so many take about a millisecond."""


class ChatDialect:
    """Conversations in, messages out."""

    name = "chat"
    id_prefix = "chatcmpl-"
    prompt_field = "messages"

    def read(self, data: Mapping[str, Any], caller: Caller) -> TextRequest:
        """Check the fields of a body."""
        return read(ChatRequest, data)

    async def prompts(self, request: TextRequest, text: TextProcessor, room: int) -> list[Prompt]:
        """Render the conversation and tokenize it."""
        assert isinstance(request, ChatRequest)
        check_choice(request.tools, request.tool_choice)
        if request.callable_tools and text.tool_format is None and not request.tool_choice.forced:
            raise InvalidRequestError(
                "tools: how this model writes function calls is not known; set the router's "
                "tool_parser, or tool_choice to required.",
                param="tools",
            )
        prompt = await rendered(request, text)
        ids = await text.encode(prompt, add_special_tokens=request.add_special_tokens, room=room)
        return [
            Prompt(
                token_ids=ids,
                continued=request.continue_final_message,
                opens_reasoning=begins_in_reasoning(prompt),
            )
        ]

    def parser(
        self, request: TextRequest, prompt: Prompt, text: TextProcessor
    ) -> MessageParser | None:
        """Finds reasoning and calls, where there can be any."""
        assert isinstance(request, ChatRequest)
        if request.tool_choice.forced:
            return MessageParser(
                tools=CallListParser(),
                short_ids=text.tool_format is not None and text.tool_format.short_ids,
            )
        reasoning = None
        if text.reasons and request.separate_reasoning and request.structured is None:
            reasoning = ReasoningSplit(inside=prompt.opens_reasoning)
        tool_format = text.tool_format if request.callable_tools else None
        if reasoning is None and tool_format is None:
            return None
        names = frozenset(tool.function.name for tool in request.callable_tools)
        return MessageParser(
            reasoning=reasoning,
            hold_reasoning=not request.stream_reasoning,
            tools=tool_format.new_parser(names) if tool_format else None,
            short_ids=tool_format is not None and tool_format.short_ids,
            one_call=not request.parallel_tool_calls,
        )

    def structure(self, request: TextRequest, text: TextProcessor) -> StructuredOutput | None:
        """What was asked for; where the model may call functions, that or calls."""
        assert isinstance(request, ChatRequest)
        asked = request.structured
        may_call = request.callable_tools and not request.tool_choice.forced
        if asked is None or not may_call or text.tool_format is None:
            return asked
        return calls_or_answer(
            request.callable_tools,
            asked,
            text,
            tool_format=text.tool_format,
            parallel=request.parallel_tool_calls,
        )

    def aliases(self, request: TextRequest) -> list[str]:
        """The client's own name of the request, if it gave one."""
        return [request.rid] if request.rid else []

    def answer(self, request: TextRequest, facts: AnswerFacts) -> Answer:
        """An answer in the endpoint's own shape."""
        return ChatAnswer(facts, request)

    def default_max_tokens(self, configured: int) -> int | None:
        """The rest of the context, as in OpenAI's API."""
        return None


async def rendered(conversation: ConversationFields, text: TextProcessor) -> str:
    """The prompt of a conversation, to be encoded without adding special tokens.

    Raises:
        InvalidRequestError: the chat template refuses it, or takes no tools.
    """
    if len(conversation.messages) + len(conversation.callable_tools) <= INLINE_MESSAGES:
        return _render(conversation, text)
    return await asyncio.to_thread(_render, conversation, text)


def _render(conversation: ConversationFields, text: TextProcessor) -> str:
    tools = [tool.for_template() for tool in conversation.callable_tools]
    if tools and not text.template_reads("tools"):
        raise InvalidRequestError("tools: this model's chat template takes none.", param="tools")
    effort = conversation.reasoning_effort
    variables = dict(conversation.chat_template_kwargs)
    if effort is not None:
        if effort != "none" and not text.template_reads("reasoning_effort"):
            raise InvalidRequestError(
                "reasoning_effort: this model's chat template knows of none; leave it out.",
                param="reasoning_effort",
            )
        variables.setdefault("reasoning_effort", effort)
    return text.render_chat(
        [message.for_template() for message in conversation.messages],
        add_generation_prompt=conversation.generation_prompt,
        continue_final_message=conversation.continue_final_message,
        variables=variables,
        tools=tools or None,
    )
