"""The HTTP side of the chat: one streamed answer, text piece by text piece.

Speaks the OpenAI chat API, so it works against any server that does.
"""

import json
import ssl
from collections.abc import Generator, Iterator, Mapping, Sequence

import httpx

from core.errors import ConfigError, DiptychError, UnavailableError

Message = Mapping[str, str]
_CONNECT_TIMEOUT_S = 5.0


class ChatClient:
    """Asks one endpoint. Use as a context manager."""

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float,
        api_key: str | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        """Talk to `base_url`.

        Args:
            base_url: where it is, with or without /v1.
            timeout_s: longest silence of the server, in seconds.
            api_key: sent as a bearer token.
            trust: whose certificates to accept; default: those that this machine trusts.
        """
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            verify=trust or True,
            trust_env=False,
        )

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def model_name(self) -> str:
        """The first model that the endpoint serves.

        Raises:
            UnavailableError: nothing answers, or nothing is served yet.
        """
        try:
            answer = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if answer.status_code != httpx.codes.OK:
            raise _refusal(answer.status_code, answer.text)
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise UnavailableError(f"{self.base_url} names no model that it serves.") from None

    def answer(
        self, model: str, messages: Sequence[Message], options: Mapping[str, object]
    ) -> Generator[str, None, None]:
        """Yield the pieces of one answer. Closing the generator ends the request.

        Raises:
            DiptychError: the endpoint can't be reached, refuses, or breaks off.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise _refusal(response.status_code, response.read().decode(errors="replace"))
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: httpx.HTTPError) -> DiptychError:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return UnavailableError(
                f"The certificate of {self.base_url} is not from a CA that is trusted here. Name "
                "the file of its CA with --ca."
            )
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return UnavailableError(
                f"Nothing answers at {self.base_url}. Start it with `diptych serve`, or name "
                "another endpoint with --url."
            )
        if isinstance(error, httpx.UnsupportedProtocol):
            return ConfigError(
                f"{self.base_url} is no address of an endpoint: give --url one such as "
                "http://127.0.0.1:8000."
            )
        return UnavailableError(f"The connection to {self.base_url} broke: {error!r}.")


def trusted(ca: str | None) -> ssl.SSLContext | None:
    """Trust in the CA of a file alone; None for what this machine trusts.

    Raises:
        ConfigError: the file is not there, or holds no certificate.
    """
    if not ca:
        return None
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:  # ssl's own errors are among them
        reason = error.strerror or "it holds no certificate"
        raise ConfigError(f"--ca {ca} can't be used: {reason}.") from None


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    """Text of each server-sent event up to [DONE]."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise DiptychError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            text = choice.get("delta", {}).get("content")
            if text:
                yield text
    raise DiptychError("The answer broke off before its end.")


def _refusal(status: int, body: str) -> DiptychError:
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = body.strip()[:500] or "no reason given"
    return DiptychError(f"The endpoint answered {status}: {message}")
