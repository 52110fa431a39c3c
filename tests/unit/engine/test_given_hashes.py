"""Hashes that come with a request, their tenant's salt included."""

from collections.abc import Sequence

from core.block_hash import hash_blocks, root_hash
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.request import EngineRequest
from tests.support.engine import MakeEngine
from tests.support.fake_executor import DIGEST, undisturbed

SHORT = [5, 6]
PARAMS = SamplingParams(max_tokens=9, ignore_eos=True)


def run(engine: Engine, request_id: str, root: bytes | None) -> None:
    """A prompt that fills no block, as a router sends it."""
    engine.add(
        EngineRequest(
            request_id=request_id,
            prompt_ids=SHORT,
            sampling=PARAMS,
            block_hashes=[],
            root_hash=root,
        )
    )
    while engine.has_work:
        engine.step()


def hashes(root: bytes) -> Sequence[bytes]:
    context = [*SHORT, *undisturbed(SHORT, PARAMS)][:-1]
    return hash_blocks(context, 4, root)


def test_blocks_filled_while_generating_bear_the_salt_of_the_root(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    root = root_hash(DIGEST, salt="tenant")
    run(engine, "r", root)
    assert set(engine.cached_hashes()) == set(hashes(root))
    assert not set(engine.cached_hashes()) & set(hashes(root_hash(DIGEST)))


def test_without_a_root_nothing_is_cached_under_a_guess(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    run(engine, "r", None)
    assert engine.cached_hashes() == []
