"""The error tree: drawn, coded and carried whole."""

import re
from pathlib import Path

import pytest
from support.tree import PACKAGES

import core.errors as errors


def test_every_class_is_in_the_drawing_with_its_codes():
    drawn = dict(re.findall(r"(?:[├└]─ |    )(\w+)\s+(\d{3}  [A-Z_]+)", errors.__doc__))
    tree = {
        e.__name__: f"{e.http_status}  {e.grpc_status}"
        for e in errors.all_errors()
        if e is not errors.ServingError
    }
    assert drawn == tree


@pytest.mark.parametrize("kind", errors.all_errors())
def test_every_class_crosses_a_wire(kind):
    original = (
        kind("max_tokens", "is 0, must be at least 1")
        if kind is errors.InvalidRequest
        else kind("the fact, 3 of 4, the remedy")
    )
    again = errors.from_wire(*errors.to_wire(original))
    assert type(again) is kind and again.message == original.message
    if isinstance(again, errors.InvalidRequest):
        assert again.field == "max_tokens"


def test_an_error_of_a_newer_version_becomes_internal():
    assert type(errors.from_wire("ErrorFromTheFuture", "x")) is errors.InternalError


def test_grpc_names_exist():
    import grpc

    for kind in errors.all_errors():
        assert hasattr(grpc.StatusCode, kind.grpc_status)


def test_product_code_never_asserts_or_pickles():
    root = Path(__file__).parents[3]
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"^\s*assert ", text, re.M), path
            assert "import pickle" not in text and "torch.load" not in text, path
