"""The leader and the process that talks with Ray, where there is no Ray to talk with."""

import asyncio
from pathlib import Path

import pytest

from tests.support.nodes import node_settings
from tests.support.process import alive, free_port
from worker.exit_status import EXIT_FAILED, EXIT_NODE_LOST, EXIT_REFUSED
from worker.placement import PlacementError, RayPlacement
from worker.settings import WorkerSettings


async def outcome(settings: WorkerSettings, *, kill: bool = False) -> PlacementError:
    placement = await RayPlacement.start(settings, "prefill")
    if kill:
        placement._process.kill()
    with pytest.raises(PlacementError) as caught:
        async with asyncio.timeout(20):
            await placement.watch()
    await placement.close()
    assert not alive(placement._process.pid)
    return caught.value


def by_ray(**changes: object) -> WorkerSettings:
    address = f"127.0.0.2:{free_port()}"
    return node_settings(Path("none"), placement="ray", ray_address=address, **changes)


async def test_ray_that_does_not_answer_is_given_up_in_time() -> None:
    error = await outcome(by_ray(start_timeout_s=2.0))
    assert error.status == EXIT_NODE_LOST
    assert "did not answer" in str(error) and "127.0.0.2:" in str(error)


async def test_a_process_that_ends_unasked_fails_the_worker() -> None:
    error = await outcome(by_ray(), kill=True)
    assert error.status == EXIT_FAILED
    assert "whether Ray still runs on this host" in str(error)


async def test_where_ray_is_not_installed_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')"
    (tmp_path / "ray.py").write_text(missing)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    error = await outcome(by_ray())
    assert error.status == EXIT_REFUSED
    assert "pip install 'diptych[worker,ray]'" in str(error)
