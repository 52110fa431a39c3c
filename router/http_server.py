"""The HTTP server under the application: its socket, its TLS, the bounds of its connections."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import uvicorn

from core.errors import ConfigError
from router.http_protocol import BoundedProtocol, ConnectionLimits
from router.tls import ServerCertificate

BACKLOG = 2048
"""Connections that may wait to be accepted."""


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ConfigError: the port is taken, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"Can't listen on {host}:{port}: {error.strerror}. Choose another host or port."
        ) from None


class HttpServer(uvicorn.Server):
    """uvicorn without its own signal handlers, which would end the process before the links."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to router/main.py."""
        yield


def http_server(
    app: Any,
    *,
    limits: ConnectionLimits,
    certificate: ServerCertificate | None = None,
    shutdown_s: float,
) -> HttpServer:
    """A server that is run by `serve(sockets=[...])`.

    Args:
        app: an ASGI application.
        limits: of connections.
        certificate: None for plain HTTP.
        shutdown_s: how long answers may go on once the server was told to end.
    """
    protocol = cast(type[asyncio.Protocol], partial(BoundedProtocol, limits=limits))
    return HttpServer(
        uvicorn.Config(
            app,
            loop="none",
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(shutdown_s) + 1,
            ssl_context_factory=(lambda *_: certificate.context) if certificate else None,
        )
    )
