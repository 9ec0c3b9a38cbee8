"""One load on a router that runs alone: its process, the stub workers' and the clients'.

Owns starting and ending them, and the order of a measurement. Does not know what the figures mean,
nor what is sent: the router's process is that of `baton up --local`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cpu_time import cpu_s
from bench.report import Sample
from bench.router_plan import RouterLoad, RouterPlan
from bench.router_report import Measured
from bench.stub_worker import StubFirstToken
from cluster.local import Child
from cluster.model_source import TINY_MODEL
from cluster.redis.server import RedisServer, with_redis
from cluster.secrets import with_cluster_keys
from core.config import BatonConfig, load_config
from core.errors import Unavailable

OnDone = Callable[[int], None]
"""Takes how many more requests have ended."""


class RouterBench:
    """Measures loads, each on fresh processes; `with` holds what they share."""

    def __init__(self, plan: RouterPlan) -> None:
        """Prepare; entering starts the store of the prefix index."""
        self._plan = plan
        self._held = contextlib.ExitStack()
        self._config = BatonConfig()

    def __enter__(self) -> RouterBench:
        """Start Redis, and write a model whose context window has room for the prompts.

        Raises:
            ConfigError: Redis is not installed.
        """
        with contextlib.ExitStack() as held:
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="baton-bench-"))
            redis = RedisServer()
            held.callback(redis.stop)
            model = write_model(Path(folder), self._plan.max_model_len)
            # Nothing of a config file or of the environment: all runs measure the same.
            config = load_config(None, flags_of(self._plan, model), {})
            self._config = with_redis(with_cluster_keys(config), redis.url)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop Redis and remove the model."""
        self._held.close()

    async def measure(self, load: RouterLoad, on_done: OnDone, **router_settings: int) -> Measured:
        """Offer one load.

        Args:
            load: What all clients send together.
            on_done: Called while they send.
            router_settings: Of `router.*`, for this load alone.

        Raises:
            ServingError: A process did not start, or died.
            Unavailable: Not a single request was answered.
        """
        router = self._config.router.model_copy(update=router_settings)
        config = self._config.model_copy(update={"router": router})
        async with _Processes(config, self._plan).running(load) as processes:
            measured = await processes.measure(on_done)
        if not any(not sample.error for sample in measured.samples):
            reason = measured.samples[0].error if measured.samples else "there was none"
            raise Unavailable(f"no request was answered; the first one: {reason}")
        return measured


def flags_of(plan: RouterPlan, model: Path) -> dict[str, object]:
    """Return the settings of the router under test, where they are not the defaults."""
    return {
        "model.path": str(model),
        "router.http_port": 0,
        "router.grpc_port": 0,
        # A line for each request would go to this terminal.
        "router.log_requests": False,
        "router.max_running": max(256, 2 * plan.streams),
        # Each request has two workers, as where prefill and decode stand apart.
        "placement.path": "pd",
        "pools.prefill.replicas": plan.workers,
        "pools.decode.replicas": plan.workers,
    }


def write_model(folder: Path, max_model_len: int) -> Path:
    """Write a copy of the tiny model with another context window; no weight depends on it."""
    model = folder / TINY_MODEL.name
    model.mkdir()
    for file in TINY_MODEL.iterdir():
        (model / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    config["max_position_embeddings"] = max_model_len
    (model / "config.json").write_text(json.dumps(config))
    return model


class _Processes:
    """The processes of one load."""

    def __init__(self, config: BatonConfig, plan: RouterPlan) -> None:
        self._config = config
        self._plan = plan
        self._clients: list[Child] = []
        self._stubs: Child
        self._router: Child

    @contextlib.asynccontextmanager
    async def running(self, load: RouterLoad) -> AsyncIterator[_Processes]:
        """Start everything, and let the clients warm it up."""
        async with contextlib.AsyncExitStack() as stack:

            async def keep(child: Child) -> Child:
                stack.push_async_callback(child.stop)
                return child

            self._stubs = await keep(await Child.start("bench.stub_process"))
            order = {"config": self._config.model_dump(mode="json"), "plan": asdict(self._plan)}
            await self._stubs.send(json.dumps(order))
            self._router = await keep(await Child.spawn("router", self._config))
            ports = await self._router.recv("the router")
            workers = (await self._stubs.recv("the stub workers"))["workers"]
            await self._router.send(json.dumps({"members": workers, "is_starting": False}))
            for share in load.split(self._plan.clients):
                client = await keep(await Child.start("bench.router_client"))
                self._clients.append(client)
                order = {"port": ports["http_port"], "load": asdict(share)}
                await client.send(json.dumps(order))
            for client in self._clients:
                await client.recv("a client")
            yield self

    async def measure(self, on_done: OnDone) -> Measured:
        """Let the clients send their loads, and read what that took."""
        await self._first_tokens()  # those of the warm-up do not count
        before = self._cpu_s()
        began_at = time.monotonic()
        samples = await asyncio.gather(*(_run(client, on_done) for client in self._clients))
        took_s = time.monotonic() - began_at
        own_s, children_s = (now - then for now, then in zip(self._cpu_s(), before, strict=True))
        return Measured(
            [sample for some in samples for sample in some],
            await self._first_tokens(),
            took_s,
            own_s,
            children_s,
        )

    async def _first_tokens(self) -> dict[int, StubFirstToken]:
        await self._stubs.send("take")
        taken = (await self._stubs.recv("the stub workers"))["first_tokens"]
        return {int(seed): StubFirstToken(*instants) for seed, instants in taken.items()}

    def _cpu_s(self) -> tuple[float, float]:
        return cpu_s(self._router.process.pid)


async def _run(client: Child, on_done: OnDone) -> list[Sample]:
    """Let one client send its load; returns its samples."""
    await client.send("go")
    num_done = 0
    while True:
        message: dict[str, Any] = await client.recv("a client")
        samples = [Sample(**fields) for fields in message.get("samples", [])]
        count = int(message.get("done", len(samples)))
        on_done(count - num_done)
        num_done = count
        if "samples" in message:
            return samples
