"""Measuring the route between two workers before a request needs it: open, how long, how wide.

Owns both ends of a probe, which moves empty frames as a transfer moves full ones. Does not know
transfers, or who uses the report.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from core.errors import KVTransferError
from core.ports import MappedStream, MessageStream, Network, StreamClosed
from core.session import RouteReport
from kv_transfer import codec, frames
from kv_transfer.copying import move

MAX_PROBE_BYTES = 1 << 28
"""A peer chooses how much it is sent; this much is a second of a slow wire, and no more."""
PROBE_TIMEOUT_S = 5.0
NO_ENTRIES = np.zeros(0, frames.ENTRY)


async def answer(stream: MessageStream, probe: frames.Probe, frame_bytes: int) -> None:
    """Serve a peer's probe: one short message at once, then as many empty bytes as it asked for.

    Raises:
        StreamClosed: The peer has left.
    """
    # At once and short: it times the way alone, apart from the bytes behind it.
    await stream.send(codec.encode(0, frames.Heartbeat()))
    count = -(-min(probe.num_bytes, MAX_PROBE_BYTES) // frame_bytes)
    is_mapped = isinstance(stream, MappedStream)
    payload = None if is_mapped else memoryview(bytes(frame_bytes - frames.FRAME_HEAD_BYTES))
    for number in range(1, count + 1):
        await stream.send(codec.encode_frame(number, 0, NO_ENTRIES, payload))
    await stream.send(codec.encode(count + 1, frames.Finished()))
    await stream.close()


async def probe(
    network: Network, address: str, num_bytes: int, frame_bytes: int, now_s: Callable[[], float]
) -> RouteReport:
    """Measure the route to a peer.

    Args:
        network: To dial by; afterwards whatever it keeps for an address is warm.
        address: The peer's.
        num_bytes: How much to move, copied and summed up as a transfer is; 0: only connect.
        frame_bytes: How much at once, if the peer's memory is mapped here.
        now_s: A clock finer than a millisecond.
    """
    try:
        stream = await network.dial(address)
    except StreamClosed as error:
        return RouteReport(address, error=str(error))
    try:
        asked_at = now_s()
        await stream.send(codec.encode(0, frames.Probe(num_bytes)))
        codec.decode(await stream.recv())
        answered_at = now_s()  # the round trip, without the time that the bytes take
        num_moved = await _move_all(stream, frame_bytes)
        seconds = now_s() - answered_at
    except (StreamClosed, KVTransferError) as error:
        return RouteReport(address, stream.transport, error=str(error))
    finally:
        stream.reset()
    speed = num_moved / seconds / 1e9 if num_moved and seconds > 0 else 0.0
    return RouteReport(address, stream.transport, answered_at - asked_at, speed)


async def _move_all(stream: MessageStream, frame_bytes: int) -> int:
    target = np.zeros(0, np.uint64)
    start = np.zeros(1, np.int64)
    num_moved = 0
    while True:
        _, message = codec.decode(await stream.recv())
        if not isinstance(message, frames.Frame):
            return num_moved
        # A mapped stream carries no payload: the same bytes are read where they lie.
        source = message.payload
        if source is None and isinstance(stream, MappedStream) and stream.peer_segments:
            source = stream.peer_segments[0][:frame_bytes]
        if source is None:
            raise KVTransferError("a probe named memory that is not mapped here")
        # Copied and summed as a transfer does it: reading alone would look faster than it is.
        words = np.frombuffer(source[: len(source) // 8 * 8], np.uint64)
        # Kept between frames: fresh memory would measure page faults.
        if len(target) < len(words):
            target = np.zeros(len(words), np.uint64)
        move(words, start, (0, 0), target, start, (0, 0), (1, 1), len(words))
        num_moved += 8 * len(words)
