"""Every component test, without asking for it: no cluster left open,
and nothing left in it or on the loop.

An `InProcessCluster` checks at its end that no block, lease, transfer, attempt, permit or
subscription is left.
"""

import asyncio
import contextlib
import inspect

import pytest
from support.in_process_cluster import open_clusters

from transport.certificates import make_certificates


@pytest.fixture(autouse=True)
def every_cluster_is_closed_at_rest():
    open_clusters.clear()
    yield
    assert not open_clusters, "a cluster was not closed, so nobody checked that it was at rest"


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A folder of certificates for this machine."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, ["localhost", "127.0.0.1"])
    return folder


@pytest.fixture(autouse=True)
async def no_task_is_left(request):
    before = asyncio.all_tasks()
    yield
    if inspect.iscoroutinefunction(request.function):
        left = {t for t in asyncio.all_tasks() - before if t is not asyncio.current_task()}
        with contextlib.suppress(TimeoutError):  # a closed gRPC call takes its time to end
            async with asyncio.timeout(5):
                await asyncio.gather(
                    *(asyncio.shield(task) for task in left), return_exceptions=True
                )
        left = {t for t in left if not t.done()}
        assert not left, f"tasks were left behind: {left}"
