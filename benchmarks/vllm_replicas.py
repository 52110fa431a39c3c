"""Two or more vLLM servers to load beside ours: one per GPU, requests in turn.

vLLM is not installed with Diptych: `--vllm` of `benchmarks.gpu_serving` names the Python path where
it is.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

_START_S = 200.0
_END_S = 20.0
_POLL_S = 0.5


@contextmanager
def vllm_replicas(
    folder: Path, python_path: str, *, longest: int, count: int = 2, log: Path
) -> Iterator[list[str]]:
    """Servers with random weights until the block ends: their base URLs.

    Args:
        folder: of the model's configuration and tokenizer.
        python_path: where vLLM can be imported from.
        longest: prompt and output together, in tokens.
        count: how many, on the first GPUs.
        log: file for what they print.

    Raises:
        RuntimeError: one did not start; its words are in `log`.
    """
    urls, children = [], []
    with log.open("w") as output:
        for gpu in range(count):
            port = _free_port()
            urls.append(f"http://127.0.0.1:{port}")
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
            command += ["--model", str(folder), "--load-format", "dummy", "--dtype", "bfloat16"]
            command += ["--host", "127.0.0.1", "--port", str(port)]
            command += ["--max-model-len", str(longest + 1)]
            environment = {
                **os.environ,
                "PYTHONPATH": python_path,
                "CUDA_VISIBLE_DEVICES": str(gpu),
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
            }
            children.append(
                subprocess.Popen(command, stdout=output, stderr=output, env=environment)
            )
        try:
            _wait_ready(urls, children)
            yield urls
        finally:
            for child in children:
                child.terminate()
            for child in children:
                try:
                    child.wait(_END_S)
                except subprocess.TimeoutExpired:
                    child.kill()


def _wait_ready(urls: Sequence[str], children: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _START_S
    waiting = list(urls)
    while waiting:
        if time.monotonic() > deadline or any(child.poll() is not None for child in children):
            raise RuntimeError("vLLM did not start; see its log")
        try:
            if httpx.get(f"{waiting[0]}/health", timeout=2).status_code == httpx.codes.OK:
                waiting.pop(0)
        except httpx.HTTPError:
            time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
