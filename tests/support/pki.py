"""Certificates for tests, as files."""

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Files:
    """PEM files of a CA and of a certificate for loopback."""

    ca: Path
    cert: Path
    key: Path


def issue(folder: Path, authority: trustme.CA | None = None) -> Files:
    """Make a certificate for 127.0.0.1, and a CA for it unless one is given."""
    authority = authority or trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    folder.mkdir(exist_ok=True)
    files = Files(folder / "ca.crt", folder / "tls.crt", folder / "tls.key")
    authority.cert_pem.write_to_path(str(files.ca))
    leaf.private_key_pem.write_to_path(str(files.key))
    leaf.cert_chain_pems[0].write_to_path(str(files.cert))
    return files
