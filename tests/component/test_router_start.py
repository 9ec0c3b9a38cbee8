"""What a router has when its servers listen, and lets go of when it stops."""

from cluster.router_process import RunningRouter
from core.config import BatonConfig
from simulation.ports import StaticMembership

CONFIG = {"router": {"http_port": 0, "grpc_port": 0}}


def children(pool):
    """Processes of a pool."""
    return [child._process for child in pool._children]


async def test_the_processes_beside_a_router_start_with_it_and_end_with_it():
    router = RunningRouter(BatonConfig.model_validate(CONFIG), StaticMembership())
    try:
        await router.start()
        beside = [*children(router._tokenizer._children), *children(router._bodies._parsers)]
        assert len(beside) == 3
        assert all(process is not None and process.returncode is None for process in beside)
    finally:
        await router.stop()
    assert all(process.returncode is not None for process in beside)
