"""POST /v1/chat/completions: what chats do their own way."""

from collections.abc import Mapping
from typing import Any

from router.api.answers import Answer, ChatAnswer
from router.api.job import Prompt, TextRequest
from router.api.requests import ChatRequest, ConversationFields, read
from router.text.processor import TextProcessor


class ChatDialect:
    """Conversations in, messages out."""

    name = "chat"
    id_prefix = "chatcmpl"
    prompt_field = "messages"
    answer: type[Answer] = ChatAnswer

    def read(self, data: Mapping[str, Any]) -> TextRequest:
        """Check the fields of a body."""
        return read(ChatRequest, data)

    async def prompts(self, request: TextRequest, text: TextProcessor) -> list[Prompt]:
        """Render the conversation and tokenize it."""
        assert isinstance(request, ChatRequest)
        ids = await conversation_ids(request, text)
        return [Prompt(token_ids=ids, continued=request.continue_final_message)]

    def default_max_tokens(self, configured: int) -> int | None:
        """The rest of the context, as in OpenAI's API."""
        return None


async def conversation_ids(conversation: ConversationFields, text: TextProcessor) -> list[int]:
    """Token ids of a conversation.

    Raises:
        InvalidRequestError: the chat template refuses it.
    """
    rendered = text.render_chat(
        [message.model_dump(exclude_none=True) for message in conversation.messages],
        add_generation_prompt=conversation.generation_prompt,
        continue_final_message=conversation.continue_final_message,
        variables=conversation.chat_template_kwargs,
    )
    return await text.encode(rendered, add_special_tokens=conversation.add_special_tokens)
