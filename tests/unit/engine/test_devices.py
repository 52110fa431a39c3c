import pytest
import torch

from core.errors import ConfigError
from engine.devices import usable_device

NUM_GPUS = torch.cuda.device_count()


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert usable_device("auto") == ("cuda" if NUM_GPUS else "cpu")


def test_device_that_is_there_stays_as_it_was_named() -> None:
    assert usable_device("cpu") == "cpu"
    if NUM_GPUS:
        assert usable_device("cuda:0") == "cuda:0"


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gpu'; give auto, cpu"):
        usable_device("gpu")


def test_gpu_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        usable_device(f"cuda:{NUM_GPUS}")
    if NUM_GPUS:
        assert f"{NUM_GPUS} GPUs are visible" in str(caught.value)
    elif torch.version.cuda is None:
        assert "build for CPUs" in str(caught.value)
    else:
        assert "sees no GPU" in str(caught.value)
