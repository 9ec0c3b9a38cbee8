"""`baton up`: check everything first, start, wait for a signal, leave no process behind.

Owns the foreground life of a cluster. Does not know commands or flags.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from cli.banner import announce
from cli.instances import announced
from cluster.machine_check import check_machine
from cluster.pools import num_workers
from cluster.ray.env import prepare_fresh_ray
from cluster.served_model import kv_pools_of, model_of
from cluster.server_ports import claimed
from core import events, logs
from core.addresses import is_loopback
from core.config import BatonConfig, load_config, log_renamed
from core.session import Role
from core.tenant_classes import TenantClasses
from engine.checkpoint.model_spec import ModelSpec
from process.orphan_reaper import OrphanReaper
from router.access.key_file import check_keys
from router.text.detokenizing import TextModel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
console = Console()
PublishPorts = Callable[[int, int], None]


def run_up(path: Path | None, flags: Mapping[str, object], address: str, *, is_local: bool) -> None:
    """Start a cluster and keep it until a signal arrives.

    Raises:
        ServingError: Config, model or ports are wrong, or the start failed; nothing is left
            running.
    """
    renamed: list[tuple[str, str]] = []
    config = load_config(path, flags, on_renamed=lambda old, new: renamed.append((old, new)))
    logs.configure("up", config.log.format, config.log.level)
    # Only now are the log's format and level known.
    for old, new in renamed:
        log_renamed(old, new)
    spec = model_of(config)
    warn_of_tokens_beyond(TextModel(spec.folder), spec.vocabulary_size)
    check_access(config)
    if not address:  # its processes may run elsewhere
        check_machine(config, spec)
    with contextlib.ExitStack() as claims:
        claims.enter_context(claimed(config))
        if address:
            claims.close()  # the routers may be another user's, or on another machine
        _show_start(config, spec)
        publish_ports = claims.enter_context(
            announced("local" if is_local else "ray", spec.name, path)
        )
        publish_ports(config.router.http_port, config.router.grpc_port)
        if is_local:
            asyncio.run(_run_local(config, publish_ports))
        else:
            _run_ray(config, address, publish_ports)


def _show_start(config: BatonConfig, spec: ModelSpec) -> None:
    pools = {
        role: f"{facts['kv_pool_tokens']} tokens a {role} worker "
        f"({facts['kv_block_bytes']} bytes a block)"
        for role, facts in kv_pools_of(config, spec).items()
    }
    console.print(
        f"[bold]baton[/] {spec.name} ({spec.architecture}, {spec.dtype}), context "
        f"{spec.max_model_len} tokens, KV pool {', '.join(pools.values())}"
    )
    events.CLUSTER_STARTS.log(
        version=version("baton-serve"),
        model=spec.name,
        prefill=num_workers(config, Role.PREFILL),
        decode=num_workers(config, Role.DECODE),
        routers=config.router.replicas,
    )


def warn_of_tokens_beyond(text: TextModel, vocabulary_size: int) -> None:
    """Warn of tokens that the tokenizer has and the model has not."""
    if beyond := text.beyond(vocabulary_size):
        first = next(iter(beyond.items()))
        typer.echo(
            f"baton: warning: tokenizer.json has {len(beyond)} tokens for which the model has no "
            f"row (ids from {vocabulary_size} on), the first is {first[1]!r} (id {first[0]}); "
            "prompts with one are refused",
            err=True,
        )


def check_access(config: BatonConfig) -> None:
    """Refuse a key file with a fault, and warn if keys cross a network in plain text.

    A running router is less strict: there a faulty line only opens nothing.

    Raises:
        ConfigError: Names the line.
    """
    check_keys(config.security.api_keys, config.tiers, TenantClasses(config.tenant_classes))
    host = config.router.host
    security = config.security
    is_readable = bool(security.api_keys) and not security.door_certificate
    if is_readable and not is_loopback(host) and not security.trust_network:
        typer.echo(
            f"baton: warning: router.host is {host}, which others can reach, and "
            "security.door_certificate is empty: API keys, prompts and answers cross the network "
            "in plain text; set security.door_certificate and security.door_key (`baton certs`), "
            "or security.trust_network if a proxy before the router speaks TLS",
            err=True,
        )


async def _run_local(config: BatonConfig, publish_ports: PublishPorts) -> None:
    from cluster.local import LocalCluster  # noqa: PLC0415 - loaded only where it is used

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, stop.set)
    cluster = LocalCluster(config)
    starting = loop.create_task(cluster.start())
    stopping = loop.create_task(stop.wait())
    starting.add_done_callback(
        lambda task: stop.set() if task.cancelled() or task.exception() else None
    )
    with console.status("starting workers"):
        while not starting.done() and not stop.is_set():
            await _first(starting, stopping)
    if starting.done():
        starting.result()
        if cluster.failed is not None:
            cluster.failed.add_done_callback(lambda _: stop.set())
        announce(console, config, cluster.addresses)
        publish_ports(cluster.http_port, cluster.grpc_port)
        await stop.wait()
    starting.cancel()
    stopping.cancel()
    _show_stopping()
    failure = (
        cluster.failed.exception() if cluster.failed is not None and cluster.failed.done() else None
    )
    await cluster.stop()
    if failure is not None:
        raise failure


def _show_stopping() -> None:
    events.CLUSTER_STOPS.log()
    console.print("stopping")


async def _first(*tasks: asyncio.Task[Any]) -> None:
    """Wait until one of the tasks is done, without taking its result."""
    done = asyncio.Event()
    for task in tasks:
        task.add_done_callback(lambda _: done.set())
    await done.wait()


def _run_ray(config: BatonConfig, address: str, publish_ports: PublishPorts) -> None:
    stop = threading.Event()
    orphan_reaper = None
    if not address:
        orphan_reaper = OrphanReaper()
        prepare_fresh_ray()
    with console.status("starting Ray"):
        from cluster.ray.app import RayCluster  # noqa: PLC0415 - importing Ray takes a second

        cluster = RayCluster(
            config, address, orphan_reaper.watch_folder if orphan_reaper else lambda folder: None
        )
    try:
        with console.status("starting workers on Ray"):
            cluster.start()
        for number in SIGNALS:  # after Ray, which installs handlers of its own
            signal.signal(number, lambda *_: stop.set())
        announce(console, config, [(cluster.http_port, cluster.grpc_port)])
        publish_ports(cluster.http_port, cluster.grpc_port)
        stop.wait()
        _show_stopping()
    finally:
        cluster.stop()
        if orphan_reaper is not None:
            orphan_reaper.release()
