"""The typed events of a streamed response, and the items that they build.

Invariant: at most one item is open; each is added, filled and done, in the order of the output.
"""

from collections.abc import Sequence
from typing import Any

import orjson

from router.api.output import Piece
from router.text.message import CallDelta


class ItemStream:
    """Turns pieces of an output into events, and keeps the items that they amount to."""

    def __init__(self, suffix: str) -> None:
        """Args: suffix makes the ids of the items unique."""
        self.items: list[dict[str, Any]] = []
        """Items so far; the last one may be open."""
        self._suffix = suffix
        self._sequence = 0
        self._open = ""
        self._call: int | None = None

    def event(self, kind: str, **fields: Any) -> bytes:
        """The next event of the stream."""
        data = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(data))

    def take(self, piece: Piece) -> bytes:
        """Events of a piece."""
        events = []
        if piece.reasoning:
            events.append(self._text("reasoning", piece.reasoning))
        if piece.content:
            events.append(self._text("message", piece.content))
        events += [self._take_call(call) for call in piece.calls]
        return b"".join(events)

    def close(self, status: str) -> bytes:
        """Events that end the open item with a status."""
        if not self._open:
            return b""
        item, at = self.items[-1], self._at
        item["status"] = status
        events = []
        if self._open == "function_call":
            events.append(
                self.event(
                    "response.function_call_arguments.done",
                    **at,
                    name=item["name"],
                    arguments=item["arguments"],
                )
            )
        else:
            part = item["content"][0]
            name, extra = _TEXT_EVENTS[self._open]
            at["content_index"] = 0
            events.append(self.event(f"response.{name}.done", **at, text=part["text"], **extra))
            events.append(self.event("response.content_part.done", **at, part=part))
        events.append(self.event("response.output_item.done", output_index=self._index, item=item))
        self._open = ""
        return b"".join(events)

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": self._index}

    def _begin(self, kind: str, item: dict[str, Any]) -> bytes:
        before = self.close("completed")
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item_id = f"{prefix}_{self._suffix}_{len(self.items)}"
        self.items.append({"id": item_id, "type": kind, "status": "in_progress", **item})
        self._open = kind
        return before + self.event(
            "response.output_item.added", output_index=self._index, item=self.items[-1]
        )

    def _text(self, kind: str, text: str) -> bytes:
        events = b""
        if self._open != kind:
            fixed: dict[str, Any] = (
                {"summary": []} if kind == "reasoning" else {"role": "assistant"}
            )
            events = self._begin(kind, {**fixed, "content": []})
            part: dict[str, Any] = (
                {"type": "reasoning_text", "text": ""}
                if kind == "reasoning"
                else {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            )
            events += self.event(
                "response.content_part.added", **self._at, content_index=0, part=part
            )
            self.items[-1]["content"].append(part)
        self.items[-1]["content"][0]["text"] += text
        name, extra = _TEXT_EVENTS[kind]
        return events + self.event(
            f"response.{name}.delta", **self._at, content_index=0, delta=text, **extra
        )

    def _take_call(self, call: CallDelta) -> bytes:
        events = b""
        if call.name is not None:
            fields = {"call_id": call.call_id, "name": call.name, "arguments": ""}
            events = self._begin("function_call", fields)
        if call.arguments:
            self.items[-1]["arguments"] += call.arguments
            events += self.event(
                "response.function_call_arguments.delta", **self._at, delta=call.arguments
            )
        return events


_TEXT_EVENTS: dict[str, tuple[str, dict[str, Sequence[Any]]]] = {
    "reasoning": ("reasoning_text", {}),
    "message": ("output_text", {"logprobs": []}),
}
