"""A pair of processes that send and receive over torch.distributed and do nothing else.

Owns the baseline for transports of the sidecar: the same pair, messages of the same size, as many
in flight, but no slots, streams or checksums. Does not know transfers. `bench.transfer` starts it
as `python -m bench.bare_pair KIND RANK PORT MESSAGE_BYTES`; for every count on standard input it
answers with the seconds that so many messages took.
"""

from __future__ import annotations

import socket
import sys
import time
from collections import deque
from typing import Any

import torch

from kv_transfer.sidecar.pairs import PAIRS, Pair, Rendezvous, Work, request_pair
from kv_transfer.sidecar.protocol import SLOTS

SILENCE_S = 3600.0


def _connect(kind: str, rank: int, port: int, memory: torch.Tensor) -> Pair:
    store: Any
    if rank == 0:
        rendezvous = Rendezvous(socket.create_server(("127.0.0.1", 0)))
        _report(rendezvous.port)
        store = rendezvous.next_request()
    else:
        store = request_pair(f"127.0.0.1:{port}")
    return PAIRS[kind](store, rank, "127.0.0.1", SILENCE_S, memory)


def _report(number: float) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    """Run one end: rank 0 sends, rank 1 receives."""
    kind = sys.argv[1]
    rank, port, num_bytes = map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    memory = torch.ones(SLOTS * num_bytes, dtype=torch.uint8)
    pair = _connect(kind, rank, port, memory)
    begin = pair.send if rank == 0 else pair.recv
    buffers = memory.split(num_bytes)
    for line in sys.stdin:
        in_flight: deque[Work] = deque()
        began = time.perf_counter()
        for number in range(int(line)):
            if len(in_flight) == SLOTS:
                # As many in flight as the sidecar has slots, or the comparison would be unfair.
                in_flight.popleft().wait()
            in_flight.append(begin(buffers[number % SLOTS]))
        for work in in_flight:
            work.wait()
        _report(time.perf_counter() - began)


if __name__ == "__main__":
    main()
