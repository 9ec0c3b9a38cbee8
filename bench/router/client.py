"""A process that sends requests to the router: `python -m bench.router.client LIFE_FD`.

Owns an HTTP client that does little for each request, because it shares the machine with the router
that it measures: it looks for the first event and the usage, and parses nothing between. The first
line of standard input brings the port and the load, and is answered when the router is warm; the
second one begins, and is answered with every request as it went. Does not know what the figures
mean.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, cast

import uvloop

from bench.load import Planned
from bench.report import Sample
from bench.router.plan import RouterLoad
from cluster.child import open_stdin, report
from process.parent_death import exit_with_parent

HOST = "127.0.0.1"
WARM_UP_REQUESTS = 32
WARM_UP_OUTPUT_TOKENS = 16
REQUEST_TIMEOUT_S = 120.0
"""Twice the longest load: a stream lasts as long as its load."""
EVENT = b"data: {"
TAIL_BYTES = 1024
"""Of an answer, kept to its end: the usage and the last event, or the whole of a refusal."""
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens": ?(\d+)')
_CACHED_TOKENS = re.compile(rb'"cached_tokens": ?(\d+)')
_CODE = re.compile(rb'"code": ?"(\w+)"')


class Exchange(asyncio.Protocol):
    """One request and its answer on a connection of its own."""

    def __init__(self, sample: Sample, request: bytes) -> None:
        """Send `request` when connected; the answer goes into `sample`."""
        self._sample = sample
        self._request = request
        self._head = b""
        self._status = b""
        self._seen = b""
        """The last bytes, until the first event: it may come in pieces."""
        self._tail = b""
        self._transport: asyncio.Transport | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        # uvloop's transports have asyncio's methods, and are none of its classes.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the first event and keep the end."""
        now_s = time.monotonic()
        if not self._status:
            self._head += data
            head, is_whole, data = self._head.partition(b"\r\n\r\n")
            if not is_whole:
                return
            self._status = head.split(b" ", 2)[1]
        sample = self._sample
        if not sample.arrivals and self._status == b"200":
            self._seen += data
            if EVENT in self._seen:
                sample.arrivals = [now_s]
            self._seen = self._seen[-len(EVENT) :]
        self._tail = (self._tail + data)[-TAIL_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Read what the end of the answer says."""
        sample = self._sample
        code = _CODE.search(self._tail)
        if not self._status:
            sample.error = "no answer"
        elif self._status != b"200" or code is not None:
            sample.error = f"{self._status.decode()} {code[1].decode() if code else ''}".strip()
        elif b"data: [DONE]" not in self._tail:
            sample.error = "cut off"
        sample.output_tokens = _number(_COMPLETION_TOKENS, self._tail)
        sample.input_tokens = _number(_PROMPT_TOKENS, self._tail)
        sample.cached_tokens = _number(_CACHED_TOKENS, self._tail)
        if not self.ended.done():
            self.ended.set_result(None)

    def abort(self) -> None:
        """Give up."""
        if self._transport is not None:
            self._transport.abort()


def _number(pattern: re.Pattern[bytes], text: bytes) -> int:
    found = pattern.search(text)
    return int(found[1]) if found else 0


def request_of(prompt: str, output_tokens: int, seed: int) -> bytes:
    """Write a request; the stubs know it again by its seed."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": output_tokens,
            "seed": seed,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, request: bytes, index: int, due_at: float | None = None) -> Sample:
    """Send one request and wait for its end; instants are monotonic seconds."""
    loop = asyncio.get_running_loop()
    now_s = time.monotonic()
    sample = Sample(index, now_s if due_at is None else due_at, sent_at=now_s)
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            _, exchange = await loop.create_connection(
                functools.partial(Exchange, sample, request), HOST, port
            )
            try:
                await exchange.ended
            finally:
                exchange.abort()
    except (OSError, TimeoutError) as error:
        sample.error = f"client: {type(error).__name__}"
    sample.ended_at = time.monotonic()
    return sample


async def warm_up(port: int, load: RouterLoad, prompts: Iterator[str]) -> None:
    """Send short requests that do not count, all at once, whatever becomes of them."""
    output_tokens = min(load.output_tokens, WARM_UP_OUTPUT_TOKENS)
    requests = [
        request_of(next(prompts), output_tokens, seed=0)
        for _ in range(min(WARM_UP_REQUESTS, load.requests))
    ]
    await asyncio.gather(*(ask(port, request, 0) for request in requests))


async def send(port: int, requests: Iterable[tuple[Planned, bytes]]) -> list[Sample]:
    """Send every request when it is due, and wait for every end."""
    began_at = time.monotonic()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for planned, request in requests:
            due_at = None if planned.due_s is None else began_at + planned.due_s
            if due_at is not None:
                await asyncio.sleep(max(0.0, due_at - time.monotonic()))
            tasks.append(group.create_task(ask(port, request, planned.index, due_at)))
    return [task.result() for task in tasks]


async def _main() -> None:
    lines = await open_stdin()
    order: dict[str, Any] = json.loads(await lines.readline())
    port = order["port"]
    load = RouterLoad(**order["load"])
    prompts = load.prompts()
    # Written before the first one is due, so that none is late for its own sake.
    requests = [
        (planned, request_of(next(prompts), load.output_tokens, planned.index))
        for planned in load.requests_due()
    ]
    await warm_up(port, load, prompts)
    report({"is_ready": True})
    await lines.readline()
    report({"samples": [asdict(sample) for sample in await send(port, requests)]})


if __name__ == "__main__":
    exit_with_parent(int(sys.argv[1]))
    uvloop.run(_main())
