"""Serves the console: its files are read once, when the router starts.

Made by router/app.py, unless the operator left the console out. Invariant: the page can load from
and talk to nothing but the origin that it came from, and runs no script but its own files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePosixPath

from xxhash import xxh3_64_hexdigest

from core.errors import ErrorCode
from router.api.errors import Headers, HttpError
from router.api.exchange import Exchange

INDEX = "index.html"
_MEDIA_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
_HEADERS: Headers = [
    (b"content-security-policy", _CONTENT_SECURITY_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
]


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: bytes
    etag: bytes


class ConsolePage:
    """Endpoints of the page and its parts."""

    def __init__(self) -> None:
        self._files = _read_files()

    async def index(self, exchange: Exchange) -> None:
        """The page."""
        await self._answer(exchange, INDEX)

    async def part(self, exchange: Exchange) -> None:
        """A style, a script or an image of the page."""
        await self._answer(exchange, exchange.path_params["file"])

    async def _answer(self, exchange: Exchange, name: str) -> None:
        file = self._files.get(name)
        if file is None:
            raise HttpError(404, ErrorCode.NOT_FOUND, f"The console has no file {name[:64]!r}.")
        headers = [*_HEADERS, (b"etag", file.etag)]
        if exchange.headers.get(b"if-none-match") == file.etag:
            await exchange.answer(b"", status=304, content_type=file.media_type, headers=headers)
            return
        await exchange.answer(file.body, content_type=file.media_type, headers=headers)


def _read_files() -> Mapping[str, _File]:
    files = {}
    for entry in resources.files(__package__).joinpath("static").iterdir():
        body = entry.read_bytes()
        media_type = _MEDIA_TYPES[PurePosixPath(entry.name).suffix]
        files[entry.name] = _File(body, media_type, b'"%b"' % xxh3_64_hexdigest(body).encode())
    return files
