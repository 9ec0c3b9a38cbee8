"""Two-member process groups: made for one pair, named once, thrown away when they fail.

Owns the meeting through a store of the accepting side, and sending and receiving of buffers over
`torch.distributed`, without a global group. Does not know streams, messages or processes.

A pair that failed is never used again: whoever dials next knocks with a new name. gloo closes a
pair for good at its first timeout, NCCL aborts its communicator.
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

PROBE_TIMEOUT_S = 2.0
"""Longest wait for the peer while a pair is made."""
FOR_EVER = timedelta(days=365)
KNOCKS = "knocks"


class Work(Protocol):
    """Something under way."""

    def wait(self) -> bool:
        """Wait for its end.

        Raises:
            RuntimeError: The pair has failed.
        """
        ...


class Pair(Protocol):
    """A way to one peer and back, for messages in order."""

    def use(self, arena: torch.Tensor) -> None:
        """Know the memory, uint8 [any], that most buffers lie in; before the first of them."""
        ...

    def send(self, buffer: torch.Tensor) -> Work:
        """Begin to send uint8 [n], which must stay as it is until the end."""
        ...

    def recv(self, buffer: torch.Tensor) -> Work:
        """Begin to receive a message of at most this size, uint8 [n]."""
        ...


class GlooPair:
    """Over gloo's TCP. A receive may be larger than what comes, so several can be under way."""

    def __init__(self, store: Any, rank: int, host: str, silence_s: float) -> None:  # noqa: ANN401
        """Meet the peer; both call it at the same time with different ranks.

        Args:
            store: A store of the pair alone.
            rank: 0 or 1.
            host: This side's address.
            silence_s: A receive without anything for so long ends the pair.

        Raises:
            RuntimeError: The peer did not come.
        """
        options = dist.ProcessGroupGloo._Options()  # noqa: SLF001 - names the interface
        options._timeout = timedelta(seconds=silence_s)  # noqa: SLF001
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]  # noqa: SLF001
        options._threads = 1  # noqa: SLF001
        self._group, self._peer = dist.ProcessGroupGloo(store, rank, 2, options), 1 - rank

    def use(self, arena: torch.Tensor) -> None:
        """See `Pair`."""

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

    def __init__(self, store: Any, rank: int, host: str, silence_s: float) -> None:  # noqa: ANN401
        """Meet the peer, see `GlooPair`; `host` is NCCL's to choose (NCCL_SOCKET_IFNAME)."""
        del host
        torch.cuda.set_device(0)
        self._peer, self._silence = 1 - rank, timedelta(seconds=silence_s)
        ends = [self._join(dist.PrefixStore(f"from-{sender}", store), rank) for sender in range(2)]
        self._out, self._in = ends[rank], ends[1 - rank]

    def _join(self, store: Any, rank: int) -> Any:  # noqa: ANN401
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._silence  # noqa: SLF001
        return dist.ProcessGroupNCCL(store, rank, 2, options)

    def use(self, arena: torch.Tensor) -> None:
        """See `Pair`."""

    def send(self, buffer: torch.Tensor) -> Work:
        """See `Pair`."""
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


PAIRS: dict[str, Callable[[Any, int, str, float], Pair]] = {
    "gloo": GlooPair,
    "nccl": NcclPair,
    "nixl": NixlPair,
}
"""(store, rank, host, silence) -> pair, by the transport's name."""


class Rendezvous:
    """Where peers knock: a store on a socket of the worker's, which outlives this process."""

    def __init__(self, listener: socket.socket) -> None:
        """Serve on a bound socket, which is the store's from now on."""
        host, port = listener.getsockname()[:2]
        self.port: int = port
        self._server = dist.TCPStore(
            host,
            port,
            None,
            True,
            timedelta(seconds=PROBE_TIMEOUT_S),
            False,
            master_listen_fd=listener.detach(),
        )
        self._client = self._server.clone()
        self._client.set_timeout(FOR_EVER)

    def next_request(self) -> Any:  # noqa: ANN401
        """Wait until somebody knocks; returns the pair's store."""
        name = self._client.queue_pop(KNOCKS).decode()
        return dist.PrefixStore(name, self._server.clone())


def request_pair(address: str) -> Any:  # noqa: ANN401
    """Ask for a new pair at an address "host:port"; returns its store.

    Raises:
        RuntimeError: Nobody is there.
    """
    host, _, port = address.rpartition(":")
    store = dist.TCPStore(
        bare_host(host), int(port), None, False, timedelta(seconds=PROBE_TIMEOUT_S), False
    )
    # One step, so that whoever dies in the middle of knocking blocks nobody behind him.
    name = f"pair-{secrets.token_hex(16)}"
    store.queue_push(KNOCKS, name.encode())
    return dist.PrefixStore(name, store)
