"""The PEM files of one process's gRPC TLS, taken anew when they are renewed.

Asked by rpc/auth.py for every handshake of a server and every channel. Invariant: what is given out
was read together and fits together, whatever is being written at that moment.
"""

import logging
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path

from core.errors import ConfigError
from core.watched import WatchedFiles

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pem:
    """Contents of the files; None for one that is not named."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None = field(repr=False)


class TlsFiles:
    """A CA, and a certificate with its key; either may be absent. Any thread may ask."""

    def __init__(self, *, ca: Path | None, cert: Path | None, key: Path | None) -> None:
        self._ca, self._cert, self._key = ca, cert, key
        self._watched = WatchedFiles([path for path in (ca, cert, key) if path is not None])
        self._latest: Pem | None = None
        self._lock = threading.Lock()  # gRPC shakes hands on threads of its own

    def read(self) -> Pem:
        """The files as they are now, or as they were when they could be used last.

        Raises:
            ConfigError: they never could.
        """
        with self._lock:
            if self._latest is None:
                self._watched.changed()
                self._latest = self._load()
            while self._watched.changed():  # again, should they be replaced while they are read
                try:
                    self._latest = self._load()
                except ConfigError as error:
                    _log.error("%s What was read before stays in use.", error)
                else:
                    _log.info("TLS files were read again: new connections go by what they hold")
            return self._latest

    def _load(self) -> Pem:
        # gRPC says of files that it can't use only that a handshake failed, each time.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self._ca is not None:
                context.load_verify_locations(self._ca)
        except (OSError, ssl.SSLError) as error:
            reason = _why(error, "it holds no PEM certificate")
            raise ConfigError(f"tls_ca {self._ca} can't be used: {reason}.") from None
        try:
            if self._cert is not None and self._key is not None:
                # Without a password OpenSSL would ask a terminal for that of an encrypted key.
                context.load_cert_chain(self._cert, self._key, password="")
            return Pem(ca=_bytes(self._ca), cert=_bytes(self._cert), key=_bytes(self._key))
        except (OSError, ssl.SSLError) as error:
            reason = _why(error, "not a PEM certificate with its key")
            raise ConfigError(
                f"tls_cert {self._cert} and tls_key {self._key} can't be used: {reason}."
            ) from None


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _why(error: OSError, wrong: str) -> str:
    return wrong if isinstance(error, ssl.SSLError) else error.strerror or str(error)
