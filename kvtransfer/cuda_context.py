"""Makes a GPU usable in a thread that is not torch's.

For transports that read into device memory from threads of their own: UCX finds a GPU by the
context that is current in the thread.
"""

import ctypes

from core.errors import TransferError


def use_gpu(device_id: int) -> None:
    """Make the GPU's primary context, which torch uses too, current in this thread.

    Raises:
        TransferError: there is no such GPU, or no driver.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"The CUDA driver can't be loaded: {error}.") from error
    device, context = ctypes.c_int(), ctypes.c_void_p()
    # Retained and never released: the pool that lies there needs it until the process ends.
    steps = (
        ("cuInit", (ctypes.c_uint(0),)),
        ("cuDeviceGet", (ctypes.byref(device), ctypes.c_int(device_id))),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
    )
    for name, arguments in steps:
        if code := getattr(driver, name)(*arguments):
            raise TransferError(f"GPU {device_id} can't be used: {name} gave CUDA error {code}.")
