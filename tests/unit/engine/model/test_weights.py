"""Linear products whose rows do not depend on the batch, on every kind of CPU."""

import pytest
import torch

from engine.model import weights
from engine.model.weights import MIN_ROWS, TILE_ROWS, Linear, padded_rows

CPU = torch.device("cpu")


@pytest.fixture
def without_bf16(monkeypatch):
    """A CPU of which oneDNN has no bf16 products, as those without AVX-512."""
    if not weights.HAS_ONEDNN:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(weights, "HAS_BF16_PRODUCTS", False)


def product(seed=1, rows=70):
    drawn = torch.Generator().manual_seed(seed)
    weight, bias, x = (
        torch.randn(*shape, generator=drawn).bfloat16() for shape in ((96, 80), (96,), (rows, 80))
    )
    return weight, bias, x


def test_bf16_is_computed_in_fp32_and_rounded_where_the_cpu_has_none(without_bf16):
    weight, bias, x = product()
    found = Linear(weight, bias)(x)
    exact = (x.double() @ weight.double().T + bias.double()).bfloat16()
    assert found.dtype is torch.bfloat16
    # Sums in fp32 round to another neighbour where the exact one lies between two.
    assert (found != exact).float().mean() < 0.01
    assert torch.allclose(found.float(), exact.float(), rtol=2**-7)
    assert weight.dtype is torch.bfloat16, "the caller's weight stays what it was"


def test_its_rows_do_not_depend_on_their_number(without_bf16):
    weight, bias, x = product()
    linear = Linear(weight, bias)
    whole = linear(x)
    for rows in range(MIN_ROWS, len(x)):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[-rows:]), whole[-rows:]), rows


def test_what_is_computed_in_fp32_is_padded_like_fp32(without_bf16):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert [padded_rows(n, dtype, CPU) for n in (1, 4, 33)] == [4, 4, 33]


def test_bf16_products_of_the_cpu_are_computed_in_whole_tiles(monkeypatch):
    monkeypatch.setattr(weights, "HAS_BF16_PRODUCTS", True)
    assert [padded_rows(n, torch.bfloat16, CPU) for n in (1, 32, 33)] == [TILE_ROWS, 32, 64]
