"""Client side of a gRPC connection. Every channel in the project is made here.

The invariant: each call carries the token, message sizes are bounded, a silent peer is noticed, and
proxies of the environment are never used.
"""

from collections.abc import Callable
from typing import Any

import grpc

from rpc.auth import Credentials

MAX_MESSAGE_BYTES = 64 << 20
"""Above any legal message: the largest is a snapshot of a prefix cache, 16 bytes per block."""
KEEPALIVE_S = 10
KEEPALIVE_TIMEOUT_S = 5

COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *COMMON_OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A worker that comes back is noticed within a second or two; gRPC's own limit is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str, credentials: Credentials) -> grpc.aio.Channel:
    """Make a channel to host:port. It connects at its first call; the caller closes it.

    Every call over it carries the token. That is done by wrapping the callables of the stubs: a
    client interceptor would put a queue into each stream.
    """
    tls = credentials.channel_credentials()
    options: list[tuple[str, Any]] = list(_CHANNEL_OPTIONS)
    if tls is None:
        channel = grpc.aio.insecure_channel(address, options=options)
    else:
        if credentials.server_name is not None:
            options.append(("grpc.ssl_target_name_override", credentials.server_name))
        channel = grpc.aio.secure_channel(address, tls, options=options)
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        setattr(channel, kind, _with_metadata(getattr(channel, kind), credentials.metadata))
    return channel


def _with_metadata(
    make: Callable[..., Callable[..., Any]], carried: tuple[tuple[str, str], ...]
) -> Callable[..., Callable[..., Any]]:
    def make_callable(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        call = make(*args, **kwargs)

        def call_with_metadata(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return call(*args, metadata=(*carried, *(metadata or ())), **kwargs)

        return call_with_metadata

    return make_callable
