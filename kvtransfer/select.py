"""Chooses the transport of a worker. Called once, when its engine process starts."""

import ipaddress
import logging
import socket
from pathlib import Path
from typing import Literal, cast, get_args

from core.errors import ConfigError, TransferError
from kvtransfer.gpu import GpuTransport
from kvtransfer.mooncake import MooncakeTransport
from kvtransfer.nixl import NixlTransport
from kvtransfer.nixl_agent import load_nixl
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import BlockPool, Transport

log = logging.getLogger(__name__)

TransportName = Literal["auto", "gpu", "nixl", "mooncake", "tcp"]


def known_transport(name: str) -> TransportName:
    """A transport's name out of a message.

    Raises:
        ConfigError: there is none of that name.
    """
    if name in get_args(TransportName):
        return cast(TransportName, name)
    raise ConfigError(f"kv_transport must be auto, gpu, nixl, mooncake or tcp, not {name!r}.")


def open_transport(
    name: TransportName,
    pool: BlockPool,
    *,
    host: str,
    token: str,
    descriptor_bytes: int | None = None,
) -> Transport:
    """Make a pool readable by peers, and peers' pools readable from here.

    Args:
        name: auto takes gpu for device memory; for host memory nixl where it works and has a path
            that copies one-sidedly (RDMA, or one machine), else tcp, and says why. Over a plain
            network UCX only emulates READs: slower than tcp, and a reader's death can abort the
            process it reads (docs/adr/0003-leases.md). It never takes mooncake, whose ports let
            anyone in.
        pool: outlives the transport.
        host: name or IP address of this machine at which peers reach it.
        token: shared secret; peers without it can't read. Empty where there is none.
        descriptor_bytes: see NixlTransport; the others have no descriptors.

    Raises:
        TransferError: the transport can't be opened; ConfigError: there is none of that name.
    """
    if name == "tcp":
        return TcpTransport(pool, host=_address(host), token=token.encode())
    if name == "mooncake":
        return MooncakeTransport(pool, host=_address(host), token=token.encode())
    if name == "gpu" or (name == "auto" and pool.device_id is not None):
        return _open_gpu(pool, token.encode(), descriptor_bytes)
    if known_transport(name) == "nixl":
        return NixlTransport(pool, token=token.encode(), descriptor_bytes=descriptor_bytes)
    address = _address(host)
    reason = "this host has no RDMA device and its peers are elsewhere"
    if has_rdma() or ipaddress.ip_address(address).is_loopback:
        try:
            return NixlTransport(pool, token=token.encode(), descriptor_bytes=descriptor_bytes)
        except TransferError as error:
            reason = error.message
    log.warning("KV moves by tcp instead of nixl: %s", reason)
    return TcpTransport(pool, host=address, token=token.encode())


def _open_gpu(pool: BlockPool, token: bytes, descriptor_bytes: int | None) -> GpuTransport:
    if pool.device_id is None:
        raise TransferError("kv_transport gpu moves device memory; on a CPU use auto, nixl or tcp.")
    nixl = None
    try:
        nixl = NixlTransport(pool, token=token, descriptor_bytes=descriptor_bytes)
    except TransferError as error:
        log.warning("KV moves between GPUs of this host only: %s", error.message)
    try:
        return GpuTransport(pool, token=token, elsewhere=nixl)
    except TransferError:
        if nixl is not None:
            nixl.close()
        raise


def could_use_nixl() -> bool:
    """True if NIXL is installed and has a faster path to other hosts than tcp is."""
    try:
        return has_rdma() and load_nixl() is not None
    except TransferError:
        return False


def has_rdma() -> bool:
    """True if the kernel shows an InfiniBand or RoCE device."""
    return any(Path("/sys/class/infiniband").glob("*"))


def _address(host: str) -> str:
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0])
    except OSError as error:
        raise TransferError(f"Can't resolve the host name {host!r}: {error}.") from error
    if address.is_unspecified:
        raise TransferError(f"Peers can't connect to {host}: set advertise_host to an own address.")
    return str(address)
