"""A pair of processes that send and receive over torch.distributed and do nothing else.

Owns the measure that carried transports are held against: the same pair, messages of the same size,
as many under way, but no slots, streams or checksums. Does not know transfers. Started by
`bench.transfer` as `python -m bench.bare_pair KIND RANK PORT MESSAGE_BYTES`; for
every count on standard input it answers with the seconds that so many messages took.
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
        _say(rendezvous.port)
        store = rendezvous.next_request()
    else:
        store = request_pair(f"127.0.0.1:{port}")
    pair = PAIRS[kind](store, rank, "127.0.0.1", SILENCE_S)
    pair.use(memory)
    return pair


def _say(number: float) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main() -> None:
    """Run one end: rank 0 sends, rank 1 receives."""
    kind, rank, port, num_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    memory = torch.ones(SLOTS * num_bytes, dtype=torch.uint8)
    pair = _connect(kind, rank, port, memory)
    begin = pair.send if rank == 0 else pair.recv
    buffers = memory.split(num_bytes)
    for line in sys.stdin:
        under_way: deque[Work] = deque()
        began = time.perf_counter()
        for number in range(int(line)):
            if len(under_way) == SLOTS:
                under_way.popleft().wait()
            under_way.append(begin(buffers[number % SLOTS]))
        for work in under_way:
            work.wait()
        _say(time.perf_counter() - began)


if __name__ == "__main__":
    main()
