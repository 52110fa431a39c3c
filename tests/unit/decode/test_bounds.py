"""What decode's settings in bytes mean in blocks."""

from core.settings import load
from decode.importer import handover_config
from decode.settings import DecodeSettings
from tests.support.kv_messages import LAYOUT, make_hello


def blocks_in_flight(*argv: str, heads: int = 1) -> int:
    settings = load(DecodeSettings, argv, prog="decode", env_prefix="TEST_DECODE_")
    hello = make_hello("D", layout=LAYOUT.with_heads(heads))
    return handover_config(settings, hello).max_inflight_blocks


def test_bytes_in_flight_from_one_peer_are_bounded_whatever_the_block() -> None:
    # Met elsewhere: With many requests at once transfers fell to a few megabytes a second.
    assert LAYOUT.block_bytes == 512
    assert blocks_in_flight("--max-inflight-bytes=8KiB") == 16
    assert blocks_in_flight("--max-inflight-bytes=8KiB", heads=4) == 4, "of all ranks together"
    assert blocks_in_flight("--max-inflight-bytes=1", heads=4) == 1, "or nothing would move"
    assert blocks_in_flight() * LAYOUT.block_bytes == 256 << 20
