"""The JSON of /generate: text, ids and `meta_info`; a stream repeats all of the text so far."""

from collections.abc import Sequence
from typing import Any

import orjson

from router.api.answer import DONE, AnswerFacts, Usage, event
from router.api.choice import Choice, EndedChoice
from router.api.errors import ErrorAnswer
from router.api.native.request import NativeRequest
from router.api.output import Piece
from router.api.prompt_scores import input_logprobs


class NativeAnswer:
    """An Answer in SGLang's shape."""

    def __init__(self, facts: AnswerFacts, request: NativeRequest) -> None:
        self._facts = facts
        self._request = request
        self._so_far: dict[int, Piece] = {}

    def opening(self, choice: Choice) -> bytes:
        """Nothing is said before the first token."""
        self._so_far[choice.index] = Piece()
        return b""

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """The choice as far as it has come."""
        so_far = self._so_far[choice.index]
        so_far.append(piece)
        return self._event(choice, so_far)

    def closing(self, choice: Choice) -> bytes:
        """The choice with the reason why it ended."""
        return self._event(choice, self._so_far[choice.index])

    def ending(self, usage: Usage) -> bytes:
        """The end of the stream."""
        return DONE

    def failure(self, error: ErrorAnswer) -> bytes:
        """The error as an event."""
        return event(error.body)

    def whole(self, choices: Sequence[EndedChoice], usage: Usage) -> bytes:
        """One object, or a list of them for a batch."""
        shown = [self._shown(ended.choice, ended.piece) for ended in choices]
        return orjson.dumps(shown if self._request.batch else shown[0])

    def _event(self, choice: Choice, piece: Piece) -> bytes:
        shown = self._shown(choice, piece)
        return event({**shown, "index": choice.index} if self._request.batch else shown)

    def _shown(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "text": piece.content,
            "output_ids": piece.token_ids,
            "meta_info": self._meta(choice, piece),
        }

    def _meta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        output, request = choice.output, self._request
        meta: dict[str, Any] = {
            "id": request.rids[choice.index // request.n]
            if request.rids
            else f"{self._facts.answer_id}-{choice.index}",
            "model": self._facts.model,
            "finish_reason": _finish(choice),
            "prompt_tokens": len(choice.prompt.token_ids),
            "completion_tokens": output.num_tokens,
            "cached_tokens": output.end.cached_tokens if output.end is not None else None,
        }
        if request.logprobs is not None:
            known = [(one.token, one.token.logprobs) for one in piece.tokens]
            meta["output_token_logprobs"] = [
                (found.logprob, token.token_id, None) for token, found in known if found
            ]
            if request.logprobs:
                meta["output_top_logprobs"] = [
                    [(logprob, token_id, None) for token_id, logprob in found.top]
                    for _, found in known
                    if found
                ]
        if request.scores_from is not None and choice.scores is not None:
            token_ids, scores = choice.prompt.token_ids, choice.scores.logprobs
            meta |= input_logprobs(token_ids, scores, request.scores_from, request.logprobs or 0)
        return meta


def _finish(choice: Choice) -> dict[str, Any] | None:
    output = choice.output
    match output.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": output.num_tokens}
        case "abort":
            return {"type": "abort", "message": "Aborted by request."}
        case _:
            end = output.end
            matched = end.matched_stop if end is not None else None
            return {"type": "stop", "matched": output.stop_reason or matched}
