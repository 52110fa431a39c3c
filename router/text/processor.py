"""Everything the API asks of a tokenizer. One instance serves all requests of a router."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from core.errors import InvalidRequestError
from router.text.chat_template import ChatTemplate
from router.text.detokeniser import Detokeniser, TableDetokeniser, WindowDetokeniser
from router.text.reasoning import BEGIN, END
from router.text.tools.formats import ToolFormat
from router.text.vocabulary import Vocabulary

INLINE_CHARS = 4096
"""Longer text is encoded in a thread: this much takes about a millisecond."""

HUGE_CHARS = 1 << 18
"""Above this, texts are encoded two at a time: each takes a core for a second and more, and no
other prompt should wait for a free thread because of them."""
_HUGE_AT_ONCE = 2
LONG_CHARS = 16
"""Per token that there is room for: a text with more characters is looked at before it is encoded
to its end. Prose has four to five for each token."""


class TextProcessor:
    """Encodes prompts, renders chats and decodes outputs as transformers would."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        *,
        tool_format: ToolFormat | None = None,
        reasons: bool = False,
    ) -> None:
        """Take over `tokenizer`: truncation and padding are switched off.

        Args:
            tokenizer: of the model.
            chat_template: None for a model without.
            tool_format: how the model writes function calls; None if that is not known.
            reasons: the model may think aloud before it answers.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = chat_template
        self._vocabulary = Vocabulary(tokenizer)
        self._huge = asyncio.Semaphore(_HUGE_AT_ONCE)
        self.tool_format = tool_format
        self.reasons = reasons
        self._added = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        markers = {BEGIN, END}.union(tool_format.shown_tokens if tool_format else ())
        self._markers = frozenset(
            token_id
            for token_id in self._vocabulary.special_ids
            if tokenizer.id_to_token(token_id) in markers
        )

    def added_token_id(self, token: str) -> int | None:
        """Id of a token that is matched whole before text is split; None for other text."""
        return self._added.get(token)

    def template_reads(self, variable: str) -> bool:
        """Whether the chat template looks at a variable at all."""
        return self._template is not None and self._template.reads(variable)

    async def encode(
        self, text: str, *, add_special_tokens: bool = True, room: int | None = None
    ) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their ids.

        Args:
            text: of any length.
            add_special_tokens: those that the model wants around a text.
            room: how many tokens are of use; of a text that has many more only the beginning is
                encoded, and that is still more than `room`.
        """
        if room is not None and len(text) > LONG_CHARS * room:
            ids = await self.encode(
                text[: LONG_CHARS * room], add_special_tokens=add_special_tokens
            )
            # Cut elsewhere a text has other tokens, but not so many fewer.
            if len(ids) > 2 * room:
                return ids
        if len(text) <= INLINE_CHARS:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if len(text) <= HUGE_CHARS:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)
        async with self._huge:
            return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation; encode the result without adding special tokens.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the conversation.
        """
        if self._template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions.", param="messages"
            )
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
            tools=tools,
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of all ids at once."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokeniser(
        self,
        *,
        skip_special_tokens: bool = True,
        show_markers: bool = False,
        context: Sequence[int] = (),
    ) -> Detokeniser:
        """Start decoding a sequence.

        Args:
            skip_special_tokens: special tokens have no text.
            show_markers: those that mark reasoning or function calls have text all the same.
            context: tokens that the output goes on from; empty when it starts a text of its own,
                where sentencepiece drops the leading space.
        """
        shown = self._markers if show_markers and skip_special_tokens else frozenset[int]()
        if self._vocabulary.exact:
            skipped = self._vocabulary.special_ids - shown
            return TableDetokeniser(
                self._vocabulary,
                skipped=skipped if skip_special_tokens else frozenset(),
                continues=bool(context),
            )
        return WindowDetokeniser(
            self._tokenizer, skip_special_tokens=skip_special_tokens, shown=shown, context=context
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token stands for, parts of a character included."""
        return self._vocabulary.token_bytes(token_id)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the ways to encode, those of batches let other threads run meanwhile; this one does not
        # note which characters a token stands for either.
        (encoding,) = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids
