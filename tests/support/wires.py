"""A prefill worker whose KV link and KV bytes go through proxies, so that a test can cut either.

The worker listens on one loopback address and tells peers another one, at which the proxy of its
link listens; where its transport serves the pool is replaced in the hello that passes by.
"""

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kvtransfer.tcp_frames import MAGIC, NONCE_BYTES
from tests.support.cluster import Worker
from tests.support.proxy import Proxy, proxy

ADVERTISED = "127.0.0.2"
SETTINGS: Mapping[str, object] = {"advertise_host": ADVERTISED}
"""For the prefill worker."""
_PORT = struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class Wires:
    """What lies between decode and one prefill worker."""

    link: Proxy
    """Of KvExport.Link, over which leases are offered, renewed and released."""
    data: Proxy
    """Of the transport's bytes; unused unless that is tcp."""

    def mend(self) -> None:
        """Let everything through."""
        self.link.mend()
        self.data.mend()


@contextmanager
def wires(worker: Worker) -> Iterator[Wires]:
    """Proxies before a worker that was started with SETTINGS and has not been linked to yet."""
    with proxy((ADVERTISED, 0), (ADVERTISED, 0)) as data:

        def redirect(answer: bytes) -> bytes:
            """Learn the port in the transport's metadata, and put the proxy's there."""
            at = answer.find(MAGIC)
            if at < 0:
                return answer
            at += len(MAGIC) + NONCE_BYTES
            (port,) = _PORT.unpack_from(answer, at)
            data.target = (ADVERTISED, port)
            return answer[:at] + _PORT.pack(data.address[1]) + answer[at + _PORT.size :]

        with proxy((ADVERTISED, worker.port), ("127.0.0.1", worker.port), redirect) as link:
            yield Wires(link, data)
