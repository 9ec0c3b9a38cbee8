"""What tests of the router share."""

import pytest
from support.keyring import MovedKeyring


@pytest.fixture
def ring(tmp_path):
    return MovedKeyring(tmp_path)
