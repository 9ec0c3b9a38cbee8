"""Fields of a body that nothing is made of."""

import pytest

from core.errors import (
    InvalidRequest,
)
from router.http.bodies import CompletionBody
from router.http.body_model import parse_body
from router.http.other_fields import ignored_fields


def test_unknown_harmless_refused_and_renamed_fields():
    def sort(*, is_strict=False, **fields):
        return ignored_fields(
            parse_body(CompletionBody, {"prompt": "x", **fields}), is_strict=is_strict
        )

    free = {"store": True, "user": "u", "verbosity": "low"}
    assert sort(flavour=1, guided_json=None, **free) == ["flavour"]
    for fields in ({"suffix": "x"}, {"guided_json": {}}, {"tools": [1]}, {"background": True}):
        with pytest.raises(InvalidRequest, match=next(iter(fields))):
            sort(**fields)
    with pytest.raises(InvalidRequest, match="flavour"):
        sort(is_strict=True, flavour=1)
