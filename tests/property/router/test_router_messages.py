"""A message is the same however its text was cut, and no call leaks into its content."""

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.text.message import MessageDelta, MessageParser
from router.text.reasoning import ReasoningSplit
from router.text.tools.call_list import CallListParser
from router.text.tools.events import ToolParser
from router.text.tools.formats import FORMATS

FUNCTIONS = ("weather", "search.web", "x")
Call = tuple[str, dict[str, object]]


def _arguments() -> st.SearchStrategy[dict[str, object]]:
    text = st.text(st.sampled_from('ab<>/{}[]",;: \\\né😀'), max_size=8)
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-99, 99) | text,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
        max_leaves=4,
    )
    return st.dictionaries(text, values, max_size=3)


CALLS = st.lists(st.tuples(st.sampled_from(FUNCTIONS), _arguments()), min_size=1, max_size=3)
WORDS = st.text(st.sampled_from("abc ,.\n<[|é"), max_size=12)
MARKS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *("<think>", "</think>", '{"name": "x"', ', "arguments": {"a": 1}'),
    *("{", "}", "[", "]", ";", " ", "x"),
]
MARKED = st.lists(st.sampled_from(MARKS), max_size=10).map("".join)


def _object(call: Call, arguments: str = "arguments", *, turned: bool = False) -> str:
    members: list[tuple[str, object]] = [("name", call[0]), (arguments, call[1])]
    return json.dumps(dict(reversed(members) if turned else members), ensure_ascii=False)


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_object(call)}\n</tool_call>" for call in calls)


def _hermes_turned(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>{_object(call, turned=True)}</tool_call>" for call in calls)


def _llama3(calls: Sequence[Call]) -> str:
    return "; ".join(_object(call, "parameters") for call in calls)


def _llama3_tagged(calls: Sequence[Call]) -> str:
    return "<|python_tag|>" + _llama3(calls)


def _mistral(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] [{', '.join(_object(call) for call in calls)}]"


def _mistral_named(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(given)}" for name, given in calls)


def _list(calls: Sequence[Call]) -> str:
    return f"[{','.join(_object(call) for call in calls)}]"


WAYS: list[tuple[str, Callable[[Sequence[Call]], str], bool]] = [
    ("hermes", _hermes, True),
    ("hermes", _hermes_turned, True),
    ("llama3", _llama3, False),
    ("llama3", _llama3_tagged, True),
    ("mistral", _mistral, True),
    ("mistral", _mistral_named, True),
    ("list", _list, False),
]


def _parser(name: str) -> ToolParser:
    return CallListParser() if name == "list" else FORMATS[name].new_parser(FUNCTIONS)


def _parse(parser: MessageParser, pieces: Sequence[str]) -> MessageDelta:
    whole = MessageDelta()
    for piece in pieces:
        whole.extend(parser.feed(piece))
    whole.extend(parser.finish())
    return whole


def _said(message: MessageDelta) -> tuple[str, str, list[tuple[str | None, str]]]:
    assert len({call.call_id for call in message.calls}) == len(message.calls)
    calls = [(call.name, call.arguments) for call in message.calls]
    return message.content, message.reasoning, calls


@st.composite
def _cuts(draw: st.DrawFn, text: str) -> list[str]:
    at = sorted(draw(st.sets(st.integers(0, len(text)), max_size=12)))
    return [text[i:j] for i, j in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize(("name", "write", "takes_text"), WAYS)
@given(data=st.data(), calls=CALLS, before=WORDS)
@settings(max_examples=40, deadline=None)
def test_calls_come_out_as_they_went_in(
    name: str,
    write: Callable[[Sequence[Call]], str],
    takes_text: bool,
    data: st.DataObject,
    calls: list[Call],
    before: str,
) -> None:
    before = before if takes_text else ""
    pieces = data.draw(_cuts(before + write(calls)))
    message = _parse(MessageParser(tools=_parser(name)), pieces)
    assert message.content == before.rstrip()
    assert [(call.name, json.loads(call.arguments)) for call in message.calls] == calls
    assert [call.index for call in message.calls] == list(range(len(calls)))


@pytest.mark.parametrize("name", [*FORMATS, "list", None])
@given(data=st.data(), text=MARKED, inside=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_cut_of_any_text_gives_the_same_message(
    name: str | None, data: st.DataObject, text: str, inside: bool
) -> None:
    def parse(pieces: Sequence[str]) -> tuple[str, str, list[tuple[str | None, str]]]:
        tools = _parser(name) if name else None
        return _said(
            _parse(MessageParser(reasoning=ReasoningSplit(inside=inside), tools=tools), pieces)
        )

    assert parse(data.draw(_cuts(text))) == parse([text]) == parse(list(text))


@given(data=st.data(), thought=WORDS, answer=WORDS, inside=st.booleans(), hold=st.booleans())
@settings(max_examples=40, deadline=None)
def test_reasoning_and_answer_are_parted(
    data: st.DataObject, thought: str, answer: str, inside: bool, hold: bool
) -> None:
    text = f"{'' if inside else '<think>'}\n{thought}\n</think>\n\n{answer}"
    parser = MessageParser(reasoning=ReasoningSplit(inside=inside), hold_reasoning=hold)
    deltas = [parser.feed(piece) for piece in data.draw(_cuts(text))] + [parser.finish()]
    assert "".join(delta.reasoning for delta in deltas) == thought.strip()
    assert "".join(delta.content for delta in deltas) == answer.lstrip()
    if hold:
        assert sum(bool(delta.reasoning) for delta in deltas) <= 1


@pytest.mark.parametrize(
    ("name", "write", "marker"),
    [
        ("hermes", _hermes, "<tool_call>"),
        ("mistral", _mistral, "[TOOL_CALLS]"),
        ("mistral", _mistral_named, "[TOOL_CALLS]"),
    ],
)
@given(data=st.data(), call=st.tuples(st.sampled_from(FUNCTIONS), _arguments()))
@settings(max_examples=25, deadline=None)
def test_a_call_that_was_cut_off_leaves_no_text(
    name: str, write: Callable[[Sequence[Call]], str], marker: str, data: st.DataObject, call: Call
) -> None:
    text = "Sure. " + write([call])
    end = data.draw(st.integers(text.index(marker) + len(marker), len(text)))
    message = _parse(MessageParser(tools=_parser(name)), [text[:end]])
    assert message.content == "Sure."
    assert all(call.name in FUNCTIONS for call in message.calls)
