"""What each format does at its edges; the properties of all are in tests/property."""

import pytest

from core.errors import ConfigError
from router.text.message import MessageDelta, MessageParser
from router.text.tools.formats import FORMATS, choose_format

QWEN = (
    "{{ 'within <tool_call></tool_call> XML tags:\\n<tool_call>\\n' "
    '+ \'{"name": <function-name>, "arguments": <args-json-object>}\' }}'
)
QWEN_CODER = "{{ '<tool_call>\\n<function=example_function_name>\\n<parameter=example>' }}"
LLAMA = (
    "{{- '<|start_header_id|>assistant<|end_header_id|>' }}"
    "{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}"
)
MISTRAL = "{{- '[TOOL_CALLS] [' }}"
PLAIN = "{{ '<|im_start|>' }}"


@pytest.mark.parametrize(
    ("wanted", "template", "expected"),
    [
        ("auto", QWEN, "hermes"),
        ("auto", LLAMA, "llama3"),
        ("auto", MISTRAL, "mistral"),
        ("auto", QWEN_CODER, None),
        ("auto", PLAIN, None),
        ("auto", None, None),
        ("none", QWEN, None),
        ("mistral", QWEN, "mistral"),
    ],
)
def test_format_is_the_one_named_or_that_of_the_template(
    wanted: str, template: str | None, expected: str | None
) -> None:
    found = choose_format(wanted, template)
    assert (found.name if found else None) == expected


def test_unknown_format_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="hermes"):
        choose_format("xml", None)


def parse(name: str, text: str, *, one_call: bool = False) -> MessageDelta:
    tool_format = FORMATS[name]
    parser = MessageParser(
        tools=tool_format.new_parser({"f", "g"}),
        short_ids=tool_format.short_ids,
        one_call=one_call,
    )
    whole = MessageDelta()
    for character in text:
        whole.extend(parser.feed(character))
    whole.extend(parser.finish())
    return whole


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("f", '{"a": 1}')],
        ),
        (
            "hermes",
            '<tool_call>{"arguments": {"a": "</tool_call>"}, "id": 7, "name": "f"}</tool_call>',
            "",
            [("f", '{"a": "</tool_call>"}')],
        ),
        ("hermes", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ("hermes", "a <tool_cal", "a <tool_cal", []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}} </tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>\nDone. ', "\nDone.", [("f", "{}")]),
        ("llama3", '{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', []),
        ("llama3", '{"name": "f", "parameters": {}} Done.', " Done.", [("f", "{}")]),
        (
            "llama3",
            'So: {"name": "f", "parameters": {}}',
            'So: {"name": "f", "parameters": {}}',
            [],
        ),
        ("llama3", ' {"a', ' {"a', []),
        ("mistral", '[TOOL_CALLS]f{"a": [1]}', "", [("f", '{"a": [1]}')]),
        ("mistral", "[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{}", "", [("f", "{}")]),
        ("mistral", "[TOOL_CALLS]!", "[TOOL_CALLS]!", []),
        ("mistral", f"[TOOL_CALLS]{'f' * 300}", f"[TOOL_CALLS]{'f' * 300}", []),
        ("mistral", "[TOOL_CALLS][] ", "[TOOL_CALLS][] ", []),
    ],
)
def test_edges(name: str, text: str, content: str, calls: list[tuple[str, str]]) -> None:
    message = parse(name, text)
    assert message.content == content
    assert [(call.name, call.arguments) for call in message.calls] == calls


def test_ids_are_what_the_template_takes() -> None:
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'
    (call,) = parse("mistral", text).calls
    assert call.call_id is not None and len(call.call_id) == 9 and call.call_id.isalnum()
    (call,) = parse("hermes", '<tool_call>{"name": "f"}</tool_call>').calls
    assert call.call_id is not None and call.call_id.startswith("call_")


def test_what_follows_the_only_wanted_call_is_dropped() -> None:
    call = '<tool_call>{"name": "f"}</tool_call>'
    message = parse("hermes", f"a{call}b{call}", one_call=True)
    assert (message.content, len(message.calls)) == ("a", 1)
