"""POST /tokenize and /detokenize: the tokenizer as requests see it."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import orjson

from core.errors import InvalidRequestError
from router.api.chat import rendered
from router.api.exchange import Exchange
from router.api.parts import ApiParts
from router.api.requests import DetokenizeRequest, TokenizeChatRequest, TokenizeTextRequest, read


class TokenEndpoints:
    """Text to tokens and back, without generating."""

    def __init__(self, parts: ApiParts) -> None:
        self._parts = parts

    async def tokenize(self, exchange: Exchange) -> None:
        """Token ids of a prompt or of a conversation."""
        request = await self._parts.bodies.read(await self._body(exchange), _read)
        model = self._parts.model(request.model, exchange.caller)
        text = self._parts.text
        if isinstance(request, TokenizeChatRequest):
            prompt = await rendered(request, text)
        else:
            prompt = request.prompt
        ids = await text.encode(prompt, add_special_tokens=request.add_special_tokens)
        answer: dict[str, object] = {
            "count": len(ids),
            "max_model_len": model.max_model_len,
            "tokens": ids,
        }
        if request.return_token_strs:
            answer["token_strs"] = [
                self._parts.text.token_bytes(token_id).decode(errors="replace") for token_id in ids
            ]
        await exchange.answer(orjson.dumps(answer))

    async def detokenize(self, exchange: Exchange) -> None:
        """Text of token ids."""
        body = await self._body(exchange)
        request = await self._parts.bodies.read(body, partial(read, DetokenizeRequest))
        self._parts.model(request.model, exchange.caller)
        if not all(0 <= token_id < 2**32 for token_id in request.tokens):
            raise InvalidRequestError("tokens must be in [0, 2**32).", param="tokens")
        decode = partial(self._parts.text.decode, skip_special_tokens=request.skip_special_tokens)
        text = await asyncio.to_thread(decode, request.tokens)
        await exchange.answer(orjson.dumps({"prompt": text}))

    async def _body(self, exchange: Exchange) -> bytes:
        settings = self._parts.settings
        return await exchange.read_json_body(
            limit_bytes=settings.body_limit_bytes, timeout_s=settings.body_timeout_s
        )


def _read(data: Mapping[str, Any]) -> TokenizeTextRequest | TokenizeChatRequest:
    if "messages" in data:
        return read(TokenizeChatRequest, data)
    return read(TokenizeTextRequest, data)
