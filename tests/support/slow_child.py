"""A worker whose ranks are slow to start, as actors are: `cluster.child` with a launch that waits.

Owns the delay (seconds, in BATON_TEST_LAUNCH_DELAY_S) and the cluster made of such children, which
run this file as a script. Meanwhile the worker goes on hearing its routers and peers.
"""

import asyncio
import os
import sys
from pathlib import Path

from cluster.local import Child, LocalCluster
from cluster.members import from_json

DELAY = "BATON_TEST_LAUNCH_DELAY_S"


class SlowChild(Child):
    """A child that runs this file instead of `cluster.child`."""

    @classmethod
    async def spawn(cls, kind, config, delay_s):
        life_read, life_write = os.pipe()
        root = Path(__file__).parents[2]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            kind,
            str(life_read),
            pass_fds=(life_read,),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(root), DELAY: str(delay_s)},
        )
        os.close(life_read)
        child = cls(process, life_write)
        await child.send(config.model_dump_json())
        return child


class SlowCluster(LocalCluster):
    """Every start of a rank takes `delay_s` longer; the worker's loop stays free."""

    def __init__(self, config, delay_s):
        super().__init__(config)
        self._delay_s = delay_s

    async def _start_worker(self, name):
        child = await SlowChild.spawn(name.partition("-")[0], self.config, self._delay_s)
        self._workers[name] = child
        report = await child.recv(name)
        self._members[name] = from_json(report["worker"])


def main():
    import uvloop

    from cluster import child, worker_process
    from engine.ranks.rank_group import RankGroup, launch_child
    from process.parent_death import exit_with_parent

    delay_s = float(os.environ[DELAY])

    async def launch(rank, fds):
        await asyncio.sleep(delay_s)
        return await launch_child(rank, fds)

    def slow_group(spec, engine, _launch, **options):
        return RankGroup(spec, engine, launch, **options)

    worker_process.RankGroup = slow_group
    exit_with_parent(int(sys.argv[2]))
    uvloop.run(child._main(sys.argv[1]))


if __name__ == "__main__":
    main()
