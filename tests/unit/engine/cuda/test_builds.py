"""No step has to wait for a kernel to be built, as far as can be told without a GPU."""

import os
import subprocess
import sys

import pytest


def test_steps_of_all_kinds_need_only_kernels_that_were_rehearsed() -> None:
    pytest.importorskip("triton")
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_keys"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
