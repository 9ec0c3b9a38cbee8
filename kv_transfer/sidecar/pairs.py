"""Two-member process groups: made for one pair, named once, thrown away when they fail.

Owns the rendezvous through a store of the accepting side, and sending and receiving of buffers over
`torch.distributed`, without a global group. Does not know streams, messages or processes.

A pair that failed is never used again: whoever dials next requests one under a new name. gloo
closes a pair for good at its first timeout, NCCL aborts its communicator.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from core.addresses import bare_host
from kv_transfer.sidecar.nixl import NixlPair

dist: Any = torch.distributed  # its stubs know neither stores nor groups of one's own

CONNECT_TIMEOUT_S = 2.0
"""Longest wait for the peer while a pair is made."""
FOR_EVER = timedelta(days=365)
"""A wait for the next request has no deadline: the process ends with its worker."""
REQUESTS_KEY = "knocks"
"""The store's queue of requests. Both ends must use this name, so it stays as it is."""


class Work(Protocol):
    """A send or a receive in flight."""

    def wait(self) -> bool:
        """Wait for its end.

        Raises:
            RuntimeError: The pair has failed.
        """
        ...


class Pair(Protocol):
    """A connection to one peer, for messages in order, in both directions."""

    def send(self, buffer: torch.Tensor) -> Work:
        """Begin to send uint8 [n], which must stay as it is until the end."""
        ...

    def recv(self, buffer: torch.Tensor) -> Work:
        """Begin to receive a message of at most this size, uint8 [n]."""
        ...


class GlooPair:
    """Over gloo's TCP. A receive may be larger than what comes, so several can be in flight."""

    def __init__(
        self,
        store: Any,  # noqa: ANN401
        rank: int,
        host: str,
        silence_s: float,
        arena: torch.Tensor,
    ) -> None:
        """Connect to the peer; both call it at the same time with different ranks.

        Args:
            store: A store of the pair alone.
            rank: 0 or 1.
            host: This side's address.
            silence_s: A receive without anything for so long ends the pair.
            arena: Memory that most buffers lie in, uint8 [any]; gloo need not know it.

        Raises:
            RuntimeError: The peer did not come.
        """
        del arena
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001 - names the interface
        options._timeout = timedelta(seconds=silence_s)  # noqa: SLF001
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
        # One thread is enough for one peer, and a worker has many.
        options._threads = 1  # noqa: SLF001
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank

    def send(self, buffer: torch.Tensor) -> Work:
        """See `Pair`."""
        work: Work = self._group.send([buffer], self._peer, 0)
        return work

    def recv(self, buffer: torch.Tensor) -> Work:
        """See `Pair`."""
        work: Work = self._group.recv([buffer], self._peer, 0)
        return work


class NcclPair:
    """Over NCCL, through buffers on this process's GPU: for network cards that read GPU memory.

    NCCL knows no messages: sizes must be equal on both ends, so a head with the size goes first. A
    communicator does one thing at a time, so either direction has its own.
    """

    def __init__(
        self,
        store: Any,  # noqa: ANN401
        rank: int,
        host: str,
        silence_s: float,
        arena: torch.Tensor,
    ) -> None:
        """Connect, see `GlooPair`; `host` is NCCL's to choose (NCCL_SOCKET_IFNAME)."""
        del host, arena
        torch.cuda.set_device(0)
        self._peer = 1 - rank
        self._silence = timedelta(seconds=silence_s)
        # Both ends join in the same order: to create a communicator is itself a collective.
        ends = [self._join(dist.PrefixStore(f"from-{sender}", store), rank) for sender in range(2)]
        self._out = ends[rank]
        self._in = ends[1 - rank]

    def _join(self, store: Any, rank: int) -> Any:  # noqa: ANN401
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._silence  # noqa: SLF001
        return dist.ProcessGroupNCCL(store, rank, 2, options)

    def send(self, buffer: torch.Tensor) -> Work:
        """See `Pair`."""
        # `work.wait` bounds each by the silence: without it a dead peer would hang the thread.
        head = torch.tensor([len(buffer)], device="cuda")
        payload = buffer.to("cuda")
        return _All(
            [self._out.send([head], self._peer, 0), self._out.send([payload], self._peer, 0)],
            self._silence,
        )

    def recv(self, buffer: torch.Tensor) -> Work:
        """See `Pair`; nothing is posted before `wait`, because the size is not known."""
        return _Later(lambda: self._recv(buffer))

    def _recv(self, buffer: torch.Tensor) -> None:
        head = torch.zeros(1, dtype=torch.int64, device="cuda")
        self._in.recv([head], self._peer, 0).wait(self._silence)
        size = int(head.item())
        # A peer's number: what it announces is written into a slot of this size.
        if not 0 < size <= len(buffer):
            raise RuntimeError(f"the peer announced {size} bytes, a slot holds {len(buffer)}")
        payload = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._in.recv([payload], self._peer, 0).wait(self._silence)
        buffer[:size].copy_(payload)


class _All:
    """Several works as one."""

    def __init__(self, works: list[Any], silence: timedelta) -> None:
        self._works, self._silence = works, silence

    def wait(self) -> bool:
        return all(work.wait(self._silence) for work in self._works)


class _Later:
    """Work that is done when it is waited for."""

    def __init__(self, do: Callable[[], None]) -> None:
        self._do = do

    def wait(self) -> bool:
        self._do()
        return True


PAIRS: dict[str, Callable[[Any, int, str, float, torch.Tensor], Pair]] = {
    "gloo": GlooPair,
    "nccl": NcclPair,
    "nixl": NixlPair,
}
"""(store, rank, host, silence, arena) -> pair, by the transport's name."""


class Rendezvous:
    """Where peers request pairs: a store on a socket of the worker's, which survives us."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve on a bound socket, which is the store's from now on."""
        host, port = listener.getsockname()[:2]
        self.port: int = port
        self._server = dist.TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=CONNECT_TIMEOUT_S),
            False,
            master_listen_fd=listener.detach(),
        )
        # A wait blocks its client, whose timeout it has: the endless one is a clone's.
        self._client = self._server.clone()
        self._client.set_timeout(FOR_EVER)

    def next_request(self) -> Any:  # noqa: ANN401
        """Wait until somebody requests a pair; returns the pair's store."""
        name = self._client.queue_pop(REQUESTS_KEY).decode()
        return dist.PrefixStore(name, self._server.clone())


def request_pair(address: str) -> Any:  # noqa: ANN401
    """Request a new pair at an address "host:port"; returns its store.

    Raises:
        RuntimeError: Nobody is there.
    """
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(
        bare_host(host), int(port), None, False, timedelta(seconds=CONNECT_TIMEOUT_S), False
    )
    # In one step, so that a peer which dies in the middle of its request blocks nobody behind it.
    name = f"pair-{secrets.token_hex(16)}"
    store.queue_push(REQUESTS_KEY, name.encode())
    return dist.PrefixStore(name, store)
