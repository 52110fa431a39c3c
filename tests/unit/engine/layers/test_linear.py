import pytest
import torch

from engine.layers.linear import Linear, can_pack


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 65])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_and_plain_give_the_same_product(rows: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(48, 32, generator=generator)
    bias = torch.randn(48, generator=generator) if biased else None
    x = torch.randn(rows, 32, generator=generator)
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert can_pack(weight)
    for pack in (False, True):
        got = Linear(weight, bias, pack=pack)(x)
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_weights_without_packed_kernel_stay_plain() -> None:
    weight = torch.eye(16, dtype=torch.float64)
    assert not can_pack(weight)
    x = torch.arange(80, dtype=torch.float64).view(5, 16)
    assert torch.equal(Linear(weight, pack=True)(x), x)
