"""Loads on a router that runs alone: its process, the stub workers' and the clients'.

Owns starting and ending them, and the order of a measurement. Does not know what the figures mean,
nor what is sent. The router's process is that of `baton up --local`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cpu_time import cpu_s
from bench.report import Sample
from bench.router.client import REQUEST_TIMEOUT_S
from bench.router.plan import RouterLoad, RouterPlan
from bench.router.report import (
    Measured,
    summarise_first_token,
    summarise_overload,
    summarise_streams,
)
from bench.router.stub_worker import StubFirstToken
from cluster.local import Child
from cluster.model_source import TINY_MODEL
from cluster.redis.server import RedisServer, with_redis
from cluster.secrets import with_cluster_keys
from core.config import BatonConfig, load_config
from core.errors import Unavailable


async def measure_loads(
    plan: RouterPlan, on_load: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Offer the three loads, one after the other, each to processes of its own.

    Args:
        plan: What to measure.
        on_load: Called with a load's name when its turn comes.

    Raises:
        ConfigError: Redis is not installed, or CPU time cannot be read.
        ServingError: A process did not start, or died.
        Unavailable: Not a single request of a load was answered.
    """
    cpu_s(os.getpid())  # where it cannot be read, nothing is started
    with _running_redis(plan) as config:
        on_load("first token")
        first_token = await _measure(config, plan, plan.first_token_load())
        on_load("streams")
        streams = await _measure(config, plan, plan.stream_load())
        on_load("overload")
        limits = {"max_running": plan.max_concurrent, "max_queued": 0}
        narrow = config.model_copy(update={"router": config.router.model_copy(update=limits)})
        overload = await _measure(narrow, plan, plan.overload_load())
    return {
        "first_token": summarise_first_token(first_token),
        "streams": summarise_streams(streams),
        "overload": summarise_overload(overload),
    }


@contextlib.contextmanager
def _running_redis(plan: RouterPlan) -> Iterator[BatonConfig]:
    """Start the store of the prefix index; yields the config of router and stub workers."""
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        model = _write_model(Path(folder), plan.max_model_len)
        # Nothing of a config file or of the environment: all runs measure the same.
        config = with_cluster_keys(load_config(None, _flags_of(plan, model), {}))
        redis = RedisServer()
        try:
            yield with_redis(config, redis.url)
        finally:
            redis.stop()


def _flags_of(plan: RouterPlan, model: Path) -> dict[str, object]:
    """Return the settings of the router under test, where they are not the defaults."""
    return {
        "model.path": str(model),
        "router.http_port": 0,
        "router.grpc_port": 0,
        "router.log_requests": False,
        # Out of reach: only the load of refusals is to meet it.
        "router.max_running": 1 << 16,
        # Each request has two workers, as where prefill and decode stand apart.
        "placement.path": "pd",
        "pools.prefill.replicas": plan.workers,
        "pools.decode.replicas": plan.workers,
    }


def _write_model(folder: Path, max_model_len: int) -> Path:
    """Write a copy of the tiny model with another context window; no weight depends on it."""
    model = shutil.copytree(TINY_MODEL, folder / TINY_MODEL.name)
    file = model / "config.json"
    config = json.loads(file.read_text()) | {"max_position_embeddings": max_model_len}
    file.write_text(json.dumps(config))
    return model


async def _measure(config: BatonConfig, plan: RouterPlan, load: RouterLoad) -> Measured:
    """Start a router, stub workers and clients, let these warm it up, and offer one load."""
    async with contextlib.AsyncExitStack() as stack:

        async def keep(starting: Coroutine[Any, Any, Child]) -> Child:
            child = await starting
            stack.push_async_callback(child.stop)
            return child

        stubs = await keep(Child.start("bench.router.stub_process"))
        order = {"config": config.model_dump(mode="json"), "plan": asdict(plan)}
        await stubs.send(json.dumps(order))
        router = await keep(Child.spawn("router", config))
        listens = (await router.recv("the router"))["router"]
        workers = (await stubs.recv("the stub workers"))["workers"]
        await router.send(json.dumps({"members": workers, "is_starting": False, "routers": []}))
        clients = []
        for share in load.split(plan.clients):
            client = await keep(Child.start("bench.router.client"))
            order = {"port": listens["http_port"], "load": asdict(share)}
            await client.send(json.dumps(order))
            clients.append(client)
        for client in clients:
            await client.recv("a client")
        return await _offer(plan, router, stubs, clients)


async def _offer(
    plan: RouterPlan, router: Child, stubs: Child, clients: Sequence[Child]
) -> Measured:
    """Let the clients send their loads, and read what that took."""
    await _take_first_tokens(stubs)  # those of the warm-up do not count
    before = cpu_s(router.process.pid)
    began_at = time.monotonic()
    for client in clients:
        await client.send("go")
    timeout_s = plan.seconds + 2 * REQUEST_TIMEOUT_S
    reports = [await client.recv("a client", timeout_s) for client in clients]
    took_s = time.monotonic() - began_at
    after = cpu_s(router.process.pid)
    samples = [Sample(**fields) for report in reports for fields in report["samples"]]
    if all(sample.error for sample in samples):
        raise Unavailable(f"no request was answered; the first one: {samples[0].error}")
    return Measured(
        samples,
        await _take_first_tokens(stubs),
        took_s,
        router_cpu_s=after[0] - before[0],
        children_cpu_s=after[1] - before[1],
    )


async def _take_first_tokens(stubs: Child) -> dict[int, StubFirstToken]:
    await stubs.send("take")
    taken = (await stubs.recv("the stub workers"))["first_tokens"]
    return {int(seed): StubFirstToken(*instants) for seed, instants in taken.items()}
