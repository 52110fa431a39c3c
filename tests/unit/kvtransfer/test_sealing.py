"""What a library's parser is shown, and what not."""

import pytest

from core.errors import TransferError
from kvtransfer.sealing import open_sealed, seal


@pytest.mark.parametrize("token", [b"t", b""])
def test_content_comes_out_as_it_went_in(token: bytes) -> None:
    for content in (b"", b"where the pool lies" * 100):
        sealed = seal(content, token)
        assert open_sealed(sealed, token, library="NIXL", peer_id="p") == content


@pytest.mark.parametrize(
    "metadata",
    [b"", b"short", seal(b"x", b"other"), seal(b"x", b"t") + b"y", seal(b"x", b"t")[:-1]],
    ids=["empty", "too short", "another token", "longer", "cut"],
)
def test_anything_else_is_refused_by_name(metadata: bytes) -> None:
    with pytest.raises(TransferError, match="peer p7 are not NIXL's"):
        open_sealed(metadata, b"t", library="NIXL", peer_id="p7")
