"""The prefix index in the processes of a cluster: a worker's publisher, a router's feed.

Owns their composition over Redis, and their tasks. Does not know pools, placement or formats.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from cluster.redis.prefix_store import RedisPrefixStore
from core.clocks import SystemClock
from core.config import BatonConfig
from core.ids import WorkerLife
from core.prefix_changes import StorageTier
from prefix_index.entries import EntryCodec, entry_key, namespace_of
from prefix_index.feed import PrefixFeed
from prefix_index.publisher import Content, PrefixPublisher
from prefix_index.view import PrefixView


def make_publisher(
    config: BatonConfig, life: WorkerLife, contents: Mapping[StorageTier, Content]
) -> PrefixPublisher:
    """Put together what publishes a worker's cached blocks to Redis."""
    return PrefixPublisher(
        _store(config),
        life,
        contents,
        _codec(config),
        SystemClock(),
    )


def make_feed(
    config: BatonConfig, view: PrefixView, read_members: Callable[[], Iterable[WorkerLife]]
) -> PrefixFeed:
    """Put together what keeps a router's view up to date."""
    return PrefixFeed(_store(config), view, read_members, _codec(config), SystemClock())


def _store(config: BatonConfig) -> RedisPrefixStore:
    return RedisPrefixStore(config.redis.url, namespace_of(config.security.cluster_key))


def _codec(config: BatonConfig) -> EntryCodec:
    return EntryCodec(entry_key(config.security.cluster_key))


class IndexTask:
    """The task of a publisher or a feed."""

    def __init__(self, component: PrefixPublisher | PrefixFeed) -> None:
        """Start it on the running loop."""
        self._task = asyncio.get_running_loop().create_task(component.run())

    async def stop(self) -> None:
        """Cancel it and wait."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
