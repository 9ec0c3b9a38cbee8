"""Sampling parameters that cannot be are named."""

import pytest

from core.errors import (
    InvalidRequest,
)
from core.types import SamplingParams


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
