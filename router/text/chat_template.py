"""Renders a conversation into the prompt that the model was trained on.

Templates come with the model and are code: they run in jinja's immutable sandbox, see plain JSON
values only, and a failure inside one is the caller's 400, never a 500.

Source: the template environment and rules of Hugging Face transformers' `apply_chat_template`, with
which rendered prompts must be identical.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import ConfigError, InvalidRequestError

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Names that the template gets from the API, so chat_template_kwargs may not set them."""

_CONTINUE_MARK = "DIPTYCH_CONTINUES_HERE "


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; here its body renders as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`.

        Args:
            source: jinja text.
            special_tokens: such as `bos_token`, visible to the template under that name.

        Raises:
            ConfigError: the template is not valid jinja.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            self._variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise ConfigError(f"The model's chat template is not valid jinja: {error}.") from error
        self._special_tokens = dict(special_tokens)

    def reads(self, variable: str) -> bool:
        """Whether the template looks at a variable at all."""
        return variable in self._variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation of plain JSON values.

        Args:
            messages: at least one, each with a role and content.
            add_generation_prompt: end with the header of an assistant message.
            continue_final_message: leave the last message open, for the model to go on with.
            variables: further names for the template.
            tools: functions that the model may call, in OpenAI's shape.

        Raises:
            InvalidRequestError: the template refused the conversation, or the arguments conflict.
        """
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other; set one of "
                "them to false.",
                param="continue_final_message",
            )
        clashes = RESERVED.intersection(variables or ())
        if clashes:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {', '.join(sorted(clashes))}.",
                param="chat_template_kwargs",
            )
        chat = [dict(message) for message in messages]
        final = str(chat[-1]["content"])
        if continue_final_message:
            chat[-1]["content"] = final + _CONTINUE_MARK
        try:
            text = self._template.render(
                **{**self._special_tokens, **(variables or {})},
                messages=chat,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            raise InvalidRequestError(
                f"The model's chat template refused the conversation: {error}", param="messages"
            ) from error
        return _cut_at_mark(text, final) if continue_final_message else text


def _cut_at_mark(text: str, final: str) -> str:
    mark = _CONTINUE_MARK.strip()
    at = text.rfind(mark)
    if at < 0 or final.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message can't be honoured: the model's chat template does not render "
            "the final message as it was given.",
            param="continue_final_message",
        )
    kept = text[:at]
    # A template that trims messages took the mark's own trailing space; it would have trimmed
    # the final message's too.
    return kept if text.startswith(_CONTINUE_MARK, at) else kept.rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own tojson escapes HTML, which models never saw.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
