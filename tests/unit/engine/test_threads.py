import os
import subprocess
import sys

from engine.threads import available_cores, compute_thread_env


def _in_child(code: str, threads: int) -> str:
    env = {**os.environ, **compute_thread_env(threads)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_environment_sets_the_threads_torch_starts_with() -> None:
    assert _in_child("import torch; print(torch.get_num_threads())", 1) == "1"


def test_apply_overrules_the_environment_and_defaults_to_every_core() -> None:
    code = "from engine.threads import apply_num_threads as a; print(a(3), a(None))"
    assert _in_child(code, 1) == f"3 {available_cores()}"


def test_waiting_threads_never_spin_without_end() -> None:
    for threads in (1, 2, 64):
        env = compute_thread_env(threads)
        assert int(env["GOMP_SPINCOUNT"]) <= 30_000
        assert env["OMP_WAIT_POLICY"] == "PASSIVE"
