"""`diptych chat`: reads lines, shows answers as they stream, keeps the history.

With a terminal it prompts; with piped input it answers each line and ends, so it works in scripts.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from core.errors import DiptychError
from core.settings import Seconds, load_or_exit
from diptych.chat.client import ChatClient, Message, trusted

_HELP = "/clear forgets the conversation, /exit ends, Ctrl-C stops an answer."


class ChatSettings(BaseModel):
    """Talk to an OpenAI-compatible endpoint. Type a line; /clear forgets, /exit ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field("http://127.0.0.1:8000", description="Where the endpoint is.")
    model: str | None = Field(None, description="Model to ask; default: the first one served.")
    system: str | None = Field(None, description="System prompt; default: the model's own.")
    temperature: float = Field(0.2, ge=0, le=100, description="0 takes the likeliest token.")
    max_tokens: int = Field(512, ge=1, description="Longest answer, in tokens.")
    seed: int | None = Field(None, description="Makes answers repeatable; default: random.")
    api_key: SecretStr | None = Field(None, description="API key, sent as a bearer token.")
    ca: str | None = Field(
        None,
        description="PEM file of the CA that the endpoint's certificate must come from; default: "
        "those that this machine trusts.",
    )
    timeout_s: Seconds = Field(120.0, gt=0, description="Longest silence of the endpoint.")

    def sampling(self) -> dict[str, object]:
        """The request's share of the settings."""
        chosen = self.model_dump(include={"temperature", "max_tokens", "seed"})
        return {name: value for name, value in chosen.items() if value is not None}


class Conversation:
    """The messages so far, and how one line adds to them."""

    def __init__(self, settings: ChatSettings, client: ChatClient, model: str) -> None:
        self._settings = settings
        self._client = client
        self._model = model
        self.messages: list[Message] = []
        self.clear()

    def clear(self) -> None:
        """Forget all but the system prompt."""
        system = self._settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, line: str, show: Callable[[str], None]) -> None:
        """Send a line and show the answer piece by piece.

        Ctrl-C keeps what was shown as the answer; a failure takes the line back.

        Raises:
            DiptychError: there is no answer, or it broke off.
        """
        self.messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        options = self._settings.sampling()
        try:
            with closing(self._client.answer(self._model, self.messages, options)) as answer:
                for piece in answer:
                    pieces.append(piece)
                    show(piece)
        except KeyboardInterrupt:
            show(" (stopped)")
        except DiptychError:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def main(argv: Sequence[str]) -> int:
    """Chat until /exit or the end of input; returns the exit status."""
    settings = load_or_exit(ChatSettings, argv, prog="diptych chat", env_prefix="DIPTYCH_CHAT_")
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        trust = trusted(settings.ca)
    except DiptychError as error:
        print(f"diptych chat: {error}", file=sys.stderr)
        return 2
    with ChatClient(settings.url, timeout_s=settings.timeout_s, api_key=key, trust=trust) as client:
        try:
            model = settings.model or client.model_name()
        except DiptychError as error:
            print(f"diptych chat: {error}", file=sys.stderr)
            return 1
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"{model} at {client.base_url}. {_HELP}")
        return _converse(Conversation(settings, client, model), interactive=interactive)


def _converse(conversation: Conversation, *, interactive: bool) -> int:
    failed = False
    for line in _lines("> " if interactive else ""):
        if line == "/exit":
            break
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/"):
            print(f"There is no {line.split()[0]}. {_HELP}", file=sys.stderr)
        else:
            try:
                conversation.ask(line, _show)
            except DiptychError as error:
                failed = True
                print(f"\ndiptych chat: {error}", file=sys.stderr)
            print(flush=True)
    return 1 if failed and not interactive else 0


def _lines(prompt: str) -> Iterator[str]:
    """Lines that are not blank, until the end of input or Ctrl-C at the prompt."""
    if prompt:
        # Imported for what it does to input(): editing and history of the line.
        import readline  # noqa: F401
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print(end="\n" if prompt else "")
            return
        if line:
            yield line


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
