"""Log probabilities of a prompt in the shapes of the OpenAI, vLLM and SGLang APIs.

One sequence of a prompt reports them, its first choice; all choices of the prompt show them.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from core.errors import InvalidRequestError
from core.tokens import PromptLogprobs
from router.api.logprobs import TokenBytes, finite, token_name

MAX_PROMPT_LOGPROBS = 2**19
"""Most log probabilities of prompts in one answer: bounds its size, and the time to write it."""


class PromptScores:
    """What is known of one prompt, shared by its choices."""

    def __init__(self) -> None:
        self._told = asyncio.Event()
        self.logprobs: PromptLogprobs | None = None
        """None until told, and where there is nothing to say."""

    def tell(self, logprobs: PromptLogprobs | None) -> None:
        """Let the choices go on; only the first call counts."""
        if not self._told.is_set():
            self.logprobs = logprobs
            self._told.set()

    async def told(self) -> None:
        """Wait for `tell`; whoever is to call it does so when its sequence ends, too."""
        await self._told.wait()


def echoed_logprobs(
    echo: str,
    token_ids: Sequence[int],
    scores: PromptLogprobs | None,
    num_top: int,
    token_bytes: TokenBytes,
) -> dict[str, Any]:
    """Of an echoed prompt, as the parallel lists of a completion; null for the first token."""
    names = [token_name(token_bytes(token_id)) for token_id in token_ids]
    values: list[float | None] = [None] * len(names)
    tops: list[dict[str, float] | None] = [None] * len(names)
    if scores is not None:
        for position, value in enumerate(scores.logprobs, scores.first):
            values[position] = finite(value)
            tops[position] = {
                token_name(token_bytes(token_id)): finite(logprob)
                for token_id, logprob in scores.top(position, num_top)
            }
    return {
        "tokens": names,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": _offsets(echo, token_ids, token_bytes),
    }


def prompt_logprobs(
    token_ids: Sequence[int],
    scores: PromptLogprobs | None,
    num_top: int,
    token_bytes: TokenBytes,
) -> list[dict[str, Any] | None] | None:
    """One entry per prompt token by token id, as in vLLM; null for the first token.

    None if they never came: the request was aborted before.
    """
    if scores is None:
        return [None] if len(token_ids) == 1 else None
    entries: list[dict[str, Any] | None] = [None]
    for position, (value, rank) in enumerate(
        zip(scores.logprobs, scores.ranks, strict=True), scores.first
    ):
        ranked = [(token_ids[position], value, rank)]
        for place, (token_id, logprob) in enumerate(scores.top(position, num_top), 1):
            if token_id != token_ids[position]:
                ranked.append((token_id, logprob, place))
        entries.append(
            {
                str(token_id): {
                    "logprob": finite(logprob),
                    "rank": place,
                    "decoded_token": token_bytes(token_id).decode(errors="replace"),
                }
                for token_id, logprob, place in ranked
            }
        )
    return entries


def input_logprobs(
    token_ids: Sequence[int], scores: PromptLogprobs | None, start: int, num_top: int
) -> dict[str, Any]:
    """`meta_info` of the prompt from `start` on, as in SGLang; its first has none."""
    values: list[tuple[float | None, int, None]] = [(None, token_ids[start], None)]
    tops: list[list[tuple[float, int, None]] | None] = [None]
    if scores is not None:
        for position in range(start + 1, len(token_ids)):
            value = scores.logprobs[position - scores.first]
            values.append((finite(value), token_ids[position], None))
            tops.append(
                [
                    (finite(logprob), token_id, None)
                    for token_id, logprob in scores.top(position, num_top)
                ]
            )
    fields: dict[str, Any] = {"input_token_logprobs": values}
    return fields | ({"input_top_logprobs": tops} if num_top else {})


def check_size(prompts: Sequence[Sequence[int]], num_top: int | None, n: int) -> None:
    """Raises InvalidRequestError if the answer would be too large."""
    if num_top is None:
        return
    count = sum(map(len, prompts)) * (num_top + 1) * n
    if count > MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"The request asks for {count} log probabilities of prompt tokens; one answer has at "
            f"most {MAX_PROMPT_LOGPROBS}. Ask for fewer per token, or send fewer prompts at once.",
            param="prompt_logprobs",
        )


def check_start(start: int | None, token_ids: Sequence[int]) -> None:
    """Raises InvalidRequestError if a prompt has no token at `start`."""
    if start is not None and start >= len(token_ids):
        raise InvalidRequestError(
            f"logprob_start_len is {start}, and the prompt has {len(token_ids)} tokens.",
            param="logprob_start_len",
        )


def _offsets(echo: str, token_ids: Sequence[int], token_bytes: TokenBytes) -> list[int]:
    """Where each token starts in the echoed text, in characters.

    A token that the text does not show, such as one added before it, takes no room in it. Of a
    token that a text shows without its leading space, the rest is found.
    """
    text = echo.encode("utf-8", "surrogatepass")
    at = chars = 0
    offsets = []
    for token_id in token_ids:
        data = token_bytes(token_id)
        shown = next((each for each in (data, data[1:]) if text.startswith(each, at)), b"")
        # The rest of a character belongs to where it began.
        offsets.append(chars - 1 if shown and _continues(shown[0]) else chars)
        at += len(shown)
        chars += sum(not _continues(byte) for byte in shown)
    return offsets


def _continues(byte: int) -> bool:
    return byte & 0xC0 == 0x80
