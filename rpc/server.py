"""Server side of gRPC. Every port in the project is opened here.

The invariant: calls without the token are refused before their handler runs, health and reflection
are always there, and a port is never shared by two processes.
"""

from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from core.errors import ConfigError
from rpc.auth import Credentials, TokenInterceptor, require_protection
from rpc.channel import COMMON_OPTIONS, KEEPALIVE_S

_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),
    # Clients of this project ping every KEEPALIVE_S; gRPC's default would drop them for that.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_S * 500),
    ("grpc.http2.max_ping_strikes", 0),
)


class RpcServer:
    """A gRPC server with token check, health and reflection.

    Register servicers on `grpc_server`, then `bind`, then `start`.
    """

    def __init__(self, credentials: Credentials, *, services: Sequence[str]) -> None:
        """`services`: full names such as "diptych.v1.Worker", for health and reflection."""
        interceptors = [TokenInterceptor(credentials.token)] if credentials.token else []
        self.grpc_server = grpc.aio.server(interceptors=interceptors, options=_SERVER_OPTIONS)
        self._credentials = credentials
        self._services = tuple(services)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # stubs lack it
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc_server)
        reflection.enable_server_reflection(
            (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc_server
        )

    def bind(self, host: str, port: int, *, insecure: bool = False) -> int:
        """Take a port; 0 takes a free one.

        Returns:
            The port's number.

        Raises:
            ConfigError: the port is taken, or `host` is open to others and nothing protects it.
        """
        require_protection(host, self._credentials, insecure=insecure)
        address = f"[{host}]:{port}" if ":" in host and host[0] != "[" else f"{host}:{port}"
        tls = self._credentials.server_credentials()
        try:
            if tls is None:
                return self.grpc_server.add_insecure_port(address)
            return self.grpc_server.add_secure_port(address, tls)
        except RuntimeError:
            raise ConfigError(
                f"Can't listen on {address}: the port is taken, or the address is not one of this "
                "host's. Choose another host or port."
            ) from None

    async def start(self) -> None:
        """Answer calls. Health says NOT_SERVING until `set_serving`."""
        await self.set_serving(False)
        await self.grpc_server.start()

    async def set_serving(self, serving: bool) -> None:
        """Tell health watchers whether this process admits requests."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        now = status.SERVING if serving else status.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, now)

    async def stop(self, grace_s: float) -> None:
        """End: no new calls, and running ones are cut off after `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.grpc_server.stop(grace_s)


def build_server(credentials: Credentials, *, services: Sequence[str]) -> RpcServer:
    """A server for the named services, not yet bound."""
    return RpcServer(credentials, services=services)
