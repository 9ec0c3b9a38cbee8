"""Tests of what only a GPU can show; without one they are skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Skip the tests of this folder where torch finds no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))
