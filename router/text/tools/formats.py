"""Which format a model writes its calls in: known by name, or by its chat template."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from core.errors import ConfigError
from router.text.tools import hermes, llama3, mistral
from router.text.tools.events import ToolParser


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStyle:
    """How calls are written that a grammar shall take; parts that are markers stand alone."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    arguments: str = "arguments"
    """What the arguments stand under."""
    array: bool = False
    """One JSON array holds all calls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """A way of writing calls."""

    name: str
    new_parser: Callable[[Container[str]], ToolParser]
    """Makes the parser of one output; takes the names of the functions."""
    shown_tokens: frozenset[str]
    """Tokens that the parser must see even where special tokens have no text."""
    style: CallStyle
    short_ids: bool = False
    """Ids of calls are nine letters and digits, as the chat template wants them."""


FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        one.name: one
        for one in (
            ToolFormat(
                name="hermes",
                new_parser=lambda _: hermes.HermesParser(),
                shown_tokens=frozenset({hermes.BEGIN, hermes.END}),
                style=CallStyle(
                    before=(hermes.BEGIN, "\n"), after=("\n", hermes.END), between=("\n",)
                ),
            ),
            ToolFormat(
                name="llama3",
                new_parser=llama3.Llama3Parser,
                shown_tokens=frozenset({llama3.TAG}),
                style=CallStyle(between=("; ",), arguments="parameters"),
            ),
            ToolFormat(
                name="mistral",
                new_parser=lambda _: mistral.MistralParser(),
                shown_tokens=frozenset({mistral.MARKER, "[ARGS]", "[CALL_ID]"}),
                style=CallStyle(before=(mistral.MARKER, " "), array=True),
                short_ids=True,
            ),
        )
    }
)


def choose_format(wanted: str, template: str | None) -> ToolFormat | None:
    """The format to use.

    Args:
        wanted: a format's name, `auto` or `none`.
        template: source of the chat template.

    Returns:
        None if calls are not looked for, or nothing in the template says how they are written.

    Raises:
        ConfigError: there is no format of that name.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        if wanted not in FORMATS:
            raise ConfigError(
                f"tool_parser {wanted!r} is unknown; use auto, none or one of {', '.join(FORMATS)}."
            )
        return FORMATS[wanted]
    source = template or ""
    # Calls as XML elements, such as Qwen3-Coder's, stand between the same markers.
    if hermes.BEGIN in source and "<function=" not in source:
        return FORMATS["hermes"]
    if mistral.MARKER in source:
        return FORMATS["mistral"]
    if "<|start_header_id|>" in source and '"parameters": ' in source:
        return FORMATS["llama3"]
    return None
