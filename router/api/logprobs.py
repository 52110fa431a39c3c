"""Logprobs in the two shapes of the OpenAI API."""

from collections.abc import Callable, Sequence
from typing import Any

from router.api.output import TokenText

TokenBytes = Callable[[int], bytes]


def chat_logprobs(tokens: Sequence[TokenText], token_bytes: TokenBytes) -> dict[str, Any]:
    """Logprobs of a chat choice: a list with one entry per token."""
    content = []
    for entry in tokens:
        logprobs = entry.token.logprobs
        assert logprobs is not None
        content.append(
            {
                **_chat_entry(entry.token.token_id, logprobs.logprob, token_bytes),
                "top_logprobs": [
                    _chat_entry(token_id, logprob, token_bytes)
                    for token_id, logprob in logprobs.top
                ],
            }
        )
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: Sequence[TokenText], token_bytes: TokenBytes) -> dict[str, Any]:
    """Logprobs of a completion choice: parallel lists."""
    entries = [(entry, entry.token.logprobs) for entry in tokens]
    return {
        "tokens": [token_name(token_bytes(entry.token.token_id)) for entry, _ in entries],
        "token_logprobs": [finite(found.logprob) for _, found in entries if found],
        "top_logprobs": [
            {token_name(token_bytes(token_id)): finite(logprob) for token_id, logprob in found.top}
            for _, found in entries
            if found
        ],
        "text_offset": [entry.offset for entry, _ in entries],
    }


def _chat_entry(token_id: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    data = token_bytes(token_id)
    return {
        "token": data.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(data),
    }


def token_name(data: bytes) -> str:
    r"""A token as text; part of a character is spelt out, so that names stay distinct.

    Source: OpenAI's completions API writes such tokens as `bytes:\xf0\x9f`.
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI's clients know -9999 as "impossible"."""
    return max(logprob, -9999.0)
