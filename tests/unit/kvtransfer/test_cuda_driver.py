import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import TransferError
from kvtransfer.cuda_driver import CudaDriver, use_gpu


class Driver:
    """Answers every call of the CUDA driver with success, but one."""

    def __init__(self, failing: str) -> None:
        self.called: list[str] = []
        self._failing = failing

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> int:
            self.called.append(name)
            return 101 if name == self._failing else 0

        return call


@pytest.fixture
def driver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver(request.param)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    return made


@pytest.mark.parametrize("driver", [""], indirect=True)
def test_the_context_of_the_device_becomes_current(driver: Driver) -> None:
    use_gpu(1)
    assert driver.called == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]


@pytest.mark.parametrize("driver", ["cuDeviceGet"], indirect=True)
def test_a_gpu_that_is_not_there_is_named(driver: Driver) -> None:
    with pytest.raises(TransferError, match="GPU 7 can't be used: cuDeviceGet gave CUDA error 101"):
        use_gpu(7)
    assert "cuCtxSetCurrent" not in driver.called


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(TransferError, match="driver can't be loaded"):
        use_gpu(0)


def test_a_kernel_is_translated_once_for_all_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Translating(Driver):
        def cuModuleGetFunction(self, function: Any, module: object, name: object) -> int:
            function._obj.value = 77
            return 0

    made = Translating("")
    made.cuIpcOpenMemHandle_v2 = SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: made)
    driver = CudaDriver()
    assert [driver.load_kernel(b"code", "copy_rows") for _ in range(3)] == [77] * 3
    assert made.called == ["cuModuleLoadData"]
