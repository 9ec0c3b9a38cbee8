"""From the socket to a JSON object: bounded in bytes, in time, and in memory over all uploads.

Owns the reading of bodies, the memory they take while they arrive, and where they are parsed: small
ones here, large ones first in another process, so that no body blocks the event loop. Does not know
fields.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from typing import Any

from starlette.requests import ClientDisconnect, Request

from core.errors import (
    Cancelled,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RequestTimeout,
    Unavailable,
)
from router.child_pool import ChildPool
from router.http.body_child import parse

SMALL_BYTES = 64 << 10
"""Parsed on the loop: at most a few milliseconds."""
PARSE_TIMEOUT_S = 10.0
NUM_LARGEST = 16
"""Memory for so many uploads of full length."""


class Upload:
    """One body that is being received. `deadline` ends its reading."""

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self.deadline = deadline
        self.num_bytes = 0
        self.is_evicted = False


class UploadMemory:
    """Memory of all uploads; when it is short, the one that has stalled longest is evicted."""

    def __init__(self, limit_bytes: int) -> None:
        """Start empty."""
        self._limit_bytes = limit_bytes
        self._incomplete: OrderedDict[Upload, None] = OrderedDict()
        self.num_bytes = 0

    def take(self, upload: Upload, num_bytes: int) -> None:
        """Account for more bytes of an upload; evict others if memory is short.

        Raises:
            Overloaded: There is no other incomplete upload to evict.
        """
        self._incomplete[upload] = None
        # Last is freshest: what stands first has not moved for longest.
        self._incomplete.move_to_end(upload)
        upload.num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._limit_bytes:
            stalest = next(iter(self._incomplete))
            if stalest is upload:
                raise Overloaded("too many bodies are being received; try again later")
            stalest.is_evicted = True
            # It may have expired in this very turn of the loop: then its task has not run yet.
            if not stalest.deadline.expired():
                stalest.deadline.reschedule(asyncio.get_running_loop().time())
            self.release(stalest)

    def complete(self, upload: Upload) -> None:
        """Note that a body is whole: it stays until it is released, and is not evicted."""
        self._incomplete.pop(upload, None)

    def release(self, upload: Upload) -> None:
        """Free an upload's memory; calling this twice is harmless."""
        self._incomplete.pop(upload, None)
        self.num_bytes -= upload.num_bytes
        upload.num_bytes = 0


class BodyReader:
    """Reads the bodies of HTTP requests."""

    def __init__(self, limit_bytes: int, timeout_s: float, wait_s: float) -> None:
        """Prepare; `start` or the first large body starts the parsing process.

        Args:
            limit_bytes: Longest body.
            timeout_s: Longest time from its first byte to its last.
            wait_s: Longest wait for the parsing process.
        """
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self.memory = UploadMemory(NUM_LARGEST * limit_bytes)
        self._parsers = ChildPool(["router.http.body_child"], 1, PARSE_TIMEOUT_S, wait_s)

    async def start(self) -> None:
        """Start the parsing process now, so that the first large body does not wait for it."""
        await self._parsers.start()

    async def read(self, request: Request) -> dict[str, Any]:
        """Read a request's body.

        Raises:
            PayloadTooLarge: It has more bytes than allowed; reading stops there.
            RequestTimeout: It arrived too slowly.
            Overloaded: There was no memory for it, or the parsing process was busy.
            InvalidRequest: It is not a JSON object, or holds too much.
            Cancelled: The client left before it was whole.
        """
        deadline = asyncio.timeout(self._timeout_s)
        upload = Upload(deadline)
        try:
            async with deadline:
                data = await self._receive(request, upload)
            self.memory.complete(upload)
            return await self._parse(data, request)
        except TimeoutError as error:
            if upload.is_evicted:
                raise Overloaded(
                    "the body arrived so slowly that others needed its memory; try again later"
                ) from error
            raise RequestTimeout(
                f"the body was not complete within {self._timeout_s:g} s"
            ) from error
        except ClientDisconnect as error:
            raise Cancelled("the client left before its body was complete") from error
        finally:
            self.memory.release(upload)

    async def _receive(self, request: Request, upload: Upload) -> bytes:
        chunks = []
        async for chunk in request.stream():
            if upload.num_bytes + len(chunk) > self._limit_bytes:
                raise PayloadTooLarge(
                    f"the body has more than {self._limit_bytes} bytes; raise router.max_body_bytes"
                )
            self.memory.take(upload, len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    async def _parse(self, data: bytes, request: Request) -> dict[str, Any]:
        # A large body may be made to parse slowly, and this loop serves everybody.
        if len(data) > SMALL_BYTES:
            await self._check_in_child(data, request.state.identity.tenant)
        return parse(data)

    async def _check_in_child(self, data: bytes, tenant: str) -> None:
        """Parse a body in the other process first: if it passes, it is cheap to parse here."""
        try:
            answer = await self._parsers.ask(len(data).to_bytes(4, "big") + data, tenant)
        except TimeoutError as error:
            raise InvalidRequest("body", "took too long to parse; send less") from error
        if not answer:
            raise Unavailable("the process that parses bodies ended; try again")
        found: dict[str, str] = json.loads(answer)
        if found:
            raise InvalidRequest(found["field"], found["fact"])

    async def stop(self) -> None:
        """End the parsing process."""
        await self._parsers.stop()
