"""Who may speak on a gRPC port: the shared token and the TLS files of one process.

Every server and channel is built from one `Credentials`. A token is compared in constant time, a
port that others can reach is never opened without a token or TLS by accident, and a server takes
renewed certificates over while it runs.
"""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from core.errors import ConfigError
from rpc.tls_files import Pem, TlsFiles

AUTHORIZATION = "authorization"
_OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Probes of a Kubernetes node carry no metadata; they learn only whether the worker serves."""

if TYPE_CHECKING:  # gRPC's classes take type arguments in its stubs only
    Handler = grpc.RpcMethodHandler[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a process proves itself with, and what it asks of others.

    A server speaks TLS if it has a certificate; a channel speaks TLS if a CA is named. Each new
    connection of a server and each new channel go by the files as they are then.
    """

    token: str | None = field(default=None, repr=False)
    """Bearer token that every call carries; the same in the whole deployment."""
    ca: Path | None = None
    """PEM of the CA that peers' certificates must come from."""
    cert: Path | None = None
    """PEM of this process's certificate chain."""
    key: Path | None = None
    """PEM of its private key."""
    mutual: bool = True
    """Server: demand a certificate of `ca` from clients, when `ca` is set."""
    server_name: str | None = None
    """Channel: name that the server's certificate must bear, when it isn't the address."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("tls_cert and tls_key go together: set both or neither.")
        for name, path in (("tls_ca", self.ca), ("tls_cert", self.cert), ("tls_key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{name} names {path}, which is not a file.")
        if self.token is not None and not _is_token(self.token):
            raise ConfigError(
                "auth_token must be one or more visible ASCII characters without spaces."
            )

    @classmethod
    def from_settings(
        cls,
        *,
        token: str | None = None,
        ca: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
    ) -> "Credentials":
        """Build from the text of settings, where an empty string means unset.

        Raises:
            ConfigError: the files can't be used.
        """
        made = cls(
            token=token or None,
            ca=Path(ca) if ca else None,
            cert=Path(cert) if cert else None,
            key=Path(key) if key else None,
            server_name=server_name or None,
        )
        made._files.read()
        return made

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries. `open_channel` adds it by itself."""
        return ((AUTHORIZATION, f"Bearer {self.token}"),) if self.token else ()

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """TLS of a server; None: plain text."""
        if self.cert is None or self.key is None:
            return None
        renewed = _RenewedCertificate(self._files, ask_clients=self.mutual)
        return grpc.dynamic_ssl_server_credentials(
            renewed.first,
            renewed,  # type: ignore[arg-type]  # its stub knows no None
            require_client_authentication=self.ca is not None and self.mutual,
        )

    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        """TLS of a channel; None: plain text."""
        if self.ca is None:
            return None
        pem = self._files.read()
        return grpc.ssl_channel_credentials(
            root_certificates=pem.ca, private_key=pem.key, certificate_chain=pem.cert
        )

    @cached_property
    def _files(self) -> TlsFiles:
        return TlsFiles(ca=self.ca, cert=self.cert, key=self.key)


class _RenewedCertificate:
    """What gRPC asks before each handshake of a server for what it shall use from now on."""

    def __init__(self, files: TlsFiles, *, ask_clients: bool) -> None:
        self._files = files
        self._ask_clients = ask_clients
        self._given = files.read()
        self.first = self._shaped(self._given)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """None: nothing new."""
        latest = self._files.read()
        if latest is self._given:
            return None
        self._given = latest
        return self._shaped(latest)

    def _shaped(self, pem: Pem) -> grpc.ServerCertificateConfiguration:
        assert pem.key is not None and pem.cert is not None, "a server has both"
        return grpc.ssl_server_certificate_configuration(
            [(pem.key, pem.cert)], root_certificates=pem.ca if self._ask_clients else None
        )


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every call without the token, before its handler or its messages are looked at."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        # A handler of streams also answers unary calls, and it never waits for a first message.
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler":
        """Pass the call on, or answer it UNAUTHENTICATED."""
        if handler_call_details.method.startswith(_OPEN_PREFIX):
            return await continuation(handler_call_details)
        for name, value in handler_call_details.invocation_metadata or ():
            sent = value if isinstance(value, bytes) else value.encode()
            if name == AUTHORIZATION and hmac.compare_digest(sent, self._expected):
                return await continuation(handler_call_details)
        return self._refusal


async def _refuse(_: object, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "The call carries no valid token. Give this process the same auth_token as its peers.",
    )


def require_protection(host: str, credentials: Credentials, *, insecure: bool) -> None:
    """Refuse to open a port to others when anyone could use it.

    Raises:
        ConfigError: `host` is not loopback, there is neither token nor TLS with client
            certificates, and `insecure` is not set.
    """
    mutual_tls = credentials.cert and credentials.ca and credentials.mutual
    if insecure or credentials.token or mutual_tls or _is_loopback(host):
        return
    raise ConfigError(
        f"{host} can be reached from other hosts, and nothing would check who calls. Set "
        "auth_token, or tls_cert, tls_key and tls_ca; or set insecure to accept anyone."
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_token(token: str) -> bool:
    return bool(token) and all("!" <= c <= "~" for c in token)
