"""The cluster that every part of this benchmark starts: two routers, one Redis, the tiny model.

Owns its config, its API keys and what is read from its metrics. Does not know loads.
"""

import asyncio
import contextlib
import re
import tempfile
from collections import Counter
from pathlib import Path

import httpx
import psutil

from benchmarks.http_client import HttpClient
from cluster.local import LocalCluster
from core.config import load_config
from router.access.credentials import KeyRole, new_key

NUM_ROUTERS = 2
READY_S = 60.0
CALL_TIMEOUT_S = 30.0
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="([^"]*)"')
BASE = {
    "router.replicas": NUM_ROUTERS,
    "router.http_port": 0,
    "router.grpc_port": 0,
    "router.log_requests": False,
    "router.tokenizer_processes": 1,
}


class TieredCluster:
    """`async with TieredCluster({"acme": "batch"}) as cluster`: a key for each tenant."""

    def __init__(self, tiers_by_tenant, **changes):
        """`changes` are settings by their dotted names."""
        self._tiers_by_tenant = tiers_by_tenant
        self._changes = changes
        self._keys = {}
        self._folder = tempfile.TemporaryDirectory()
        self.local = None

    async def __aenter__(self):
        made = {tenant: new_key(tenant, tier) for tenant, tier in self._tiers_by_tenant.items()}
        made["observer"] = new_key("observer", "standard", KeyRole.METRICS)
        self._keys = {tenant: key for tenant, (key, _) in made.items()}
        file = Path(self._folder.name, "keys")
        file.touch(mode=0o600)
        file.write_text("".join(f"{line}\n" for _, line in made.values()))
        flags = {**BASE, "security.api_keys": str(file), **self._changes}
        self.local = LocalCluster(load_config(None, flags, {}))
        await self.local.start()
        await asyncio.gather(*(self.ready(index) for index in range(NUM_ROUTERS)))
        return self

    async def __aexit__(self, *_):
        await self.local.stop()
        self._folder.cleanup()

    def client(self, tenant, router=0, seed=1, timeout_s=60.0):
        headers = {"authorization": f"Bearer {self._keys[tenant]}"}
        return HttpClient(self.local.addresses[router][0], seed, headers, timeout_s)

    def clients(self, tenant, seed=1):
        """One for each router."""
        return [self.client(tenant, index, seed + index) for index in range(NUM_ROUTERS)]

    async def ready(self, router):
        """Until a router serves, also one that starts again."""
        url = f"http://127.0.0.1:{self.local.addresses[router][0]}/ready"
        async with asyncio.timeout(READY_S), self._observer() as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    def _observer(self):
        headers = {"authorization": f"Bearer {self._keys['observer']}"}
        return httpx.AsyncClient(headers=headers, timeout=CALL_TIMEOUT_S)

    def router_process(self, index):
        return psutil.Process(self.local._routers[index].process.pid)

    async def metrics(self):
        """Counters over all routers; what a router says of a worker is taken once.

        Returns:
            By (name, value of the first label, value of the second, ...).
        """
        total = Counter()
        async with self._observer() as http:
            for port, _ in self.local.addresses:
                text = (await http.get(f"http://127.0.0.1:{port}/metrics")).text
                for name, labels, value in SAMPLE.findall(text):
                    key = (name, *(value for _, value in LABEL.findall(labels)))
                    if name.startswith("baton_worker_"):
                        total[key] = max(total[key], float(value))
                    else:
                        total[key] += float(value)
        return total
