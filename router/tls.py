"""The certificate of the HTTP port, taken anew when its files are renewed.

Certificates of today live for weeks and are renewed under a running server. Connections that are
open go on under the certificate that they began with; each later one gets the new one.
"""

import logging
import ssl
from pathlib import Path

from core.errors import ConfigError
from core.watched import WatchedFiles

_log = logging.getLogger(__name__)


class ServerCertificate:
    """Certificate and key of a TLS server, and the context made of them."""

    def __init__(self, cert: Path, key: Path) -> None:
        """Load them.

        Raises:
            ConfigError: a file can't be read, or the two don't belong together.
        """
        self._cert, self._key = cert, key
        self._watched = WatchedFiles([cert, key])
        self._watched.changed()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load(self.context)

    def follow(self) -> None:
        """Use the files as they are now, if they changed and belong together."""
        if not self._watched.changed():
            return
        try:
            # A key that does not fit would leave the context in use with half of the new pair.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except ConfigError as error:
            _log.error("%s The certificate that was read before stays in use.", error)
            return
        _log.info("%s was read again: new connections get the new certificate", self._cert)

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # Without a password OpenSSL would ask a terminal for that of an encrypted key.
            context.load_cert_chain(self._cert, self._key, password="")
        except (OSError, ssl.SSLError) as error:
            reason = error.strerror or "not a PEM certificate with its key"
            raise ConfigError(
                f"http_tls_cert {self._cert} and http_tls_key {self._key} can't be used: {reason}."
            ) from None


def server_certificate(cert: str | None, key: str | None) -> ServerCertificate | None:
    """From the text of settings; None for an HTTP port without TLS.

    Raises:
        ConfigError: only one is set, or they can't be used.
    """
    if not cert and not key:
        return None
    if not cert or not key:
        raise ConfigError("http_tls_cert and http_tls_key go together: set both or neither.")
    return ServerCertificate(Path(cert), Path(key))
