"""A real Redis for the contracts of stores."""

import pytest

from cluster.redis.server import RedisServer


@pytest.fixture
def server():
    running = RedisServer()
    yield running
    running.stop()
