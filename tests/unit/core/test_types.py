"""Sampling parameters that cannot be are named; what tokens cost."""

import pytest

from core.errors import (
    InvalidRequest,
)
from core.types import Prices, SamplingParams


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"n": 9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ("é" * 200,)}, "stop"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_sampling_parameters_name_the_wrong_field(changes, field):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**changes).validate(100)
    assert caught.value.field == field


def test_a_cached_token_is_charged_once_at_its_own_price():
    assert Prices(3.0, 0.5, 10.0).cost(1000, 400, 50) == 600 * 3e-6 + 400 * 5e-7 + 50 * 1e-5
    assert Prices(0.0, 0.0, 0.0).cost(1000, 400, 50) == 0.0
