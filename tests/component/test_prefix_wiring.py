"""A real worker and a real router over a real Redis: what the one caches, the other knows."""

import asyncio
import json

from typer.testing import CliRunner

from cli.main import app
from cluster.redis.server import RedisServer
from cluster.router_process import RunningRouter
from cluster.worker_process import RunningWorker
from core.block_hash import block_hashes, hash_key, root_hash
from core.config import BatonConfig
from core.session import PoolId, Role
from simulation.ports import StaticMembership

KEY = "a secret of sufficient length"
SIZE = 16


async def test_a_worker_publishes_and_a_router_follows(tmp_path):
    server = RedisServer()
    membership = StaticMembership()
    config = BatonConfig.model_validate(
        {
            "router": {"http_port": 0, "grpc_port": 0},
            "redis": {"url": server.url},
            "security": {"cluster_key": KEY},
        }
    )
    router = RunningRouter(config, membership)
    worker = await RunningWorker.start(config, PoolId(Role.PREFILL), node="n")
    try:
        await router.start()
        membership.join(worker.descriptor)
        pool = worker.unit.pool
        tokens = list(range(3 * SIZE))
        root = root_hash(worker.descriptor.content_digest, "t", hash_key(KEY))
        names = block_hashes(root, tokens, SIZE)
        identity = pool.remember_root("t")
        taken = pool.allocate(3)
        for index, (block, name) in enumerate(zip(taken, names, strict=True)):
            own = tokens[index * SIZE : (index + 1) * SIZE]
            identity = pool.register(block, identity, name, own)
        pool.free(taken)
        async with asyncio.timeout(60):
            while router.prefix_view.match(names) != {worker.descriptor.worker_id: 3}:
                await asyncio.sleep(0.05)
        report = router.service.read_prefix_report()
        assert report["state"] == "ok" and report["workers"] == {worker.descriptor.worker_id: 3}
        assert b"baton_prefix_index_entries 3.0" in router.service.telemetry.text()
        url = f"http://127.0.0.1:{router.http_port}"
        for command, shown in (("stats", "3 blocks of 1 workers"), ("top", "3  prefill-")):
            result = await asyncio.to_thread(
                CliRunner().invoke, app, ["prefix", command, "--url", url]
            )
            assert result.exit_code == 0 and shown in result.output, result.output
        ids = tmp_path / "ids"
        ids.write_text(json.dumps([*tokens, 7]))
        asked = ["prefix", "explain", "--ids", str(ids), "--url", url]
        for more, num_blocks in ((["--salt", "t"], 3), ([], 0)):
            result = await asyncio.to_thread(CliRunner().invoke, app, [*asked, *more, "-o", "json"])
            found = json.loads(result.output)
            assert sum(row["storage"]["pool"] for row in found["workers"]) == num_blocks
            assert found["blocks"][0]["num_blocks"] == 3
        assert [row["worker"] for row in found["workers"]] == []
        table = await asyncio.to_thread(CliRunner().invoke, app, [*asked, "--salt", "t"])
        assert "3 full blocks of 16 tokens" in table.output and "pool 3" in table.output
        membership.leave(worker.descriptor.worker_id)
        async with asyncio.timeout(60):
            while router.prefix_view.match(names):
                await asyncio.sleep(0.05)
        assert not router.prefix_feed.refused
    finally:
        await router.stop()
        await worker.stop(0.0)
        server.stop()
