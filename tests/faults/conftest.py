"""One cluster for the faults that need nothing special: it is whole again after each,
so the next may use it."""

import pytest_asyncio
from support import shared as clusters
from support.process_cluster import ProcessCluster, config_of, is_long


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared():
    """A cluster that has answered its requests once without a fault."""
    async with ProcessCluster(config_of()) as cluster:
        cluster.make_requests(48 if is_long() else 24, max_tokens=80)
        await cluster.learn()
        clusters.children.append(cluster.child_pids)
        yield cluster
        clusters.children.remove(cluster.child_pids)


@pytest_asyncio.fixture(loop_scope="session")
async def learned(shared):
    """The same, whole, with nothing counted yet."""
    await shared.wait_whole()
    shared.answers.clear()
    return shared
