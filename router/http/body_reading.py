"""From the socket to a JSON object: bounded in bytes, in time, and in memory over all uploads.

Owns the reading of bodies, the memory they take while they arrive, and where they are parsed: small
ones here, large ones first in another process, so that no body stops the loop that carries every
stream. Does not know fields.
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
"""Uploads of full length that fit into memory at once."""


class Upload:
    """One body that is being received. `deadline` ends its reading."""

    def __init__(self, deadline: asyncio.Timeout) -> None:
        """No byte has arrived."""
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
        """Hold more for one upload, and evict others if need be.

        Raises:
            Overloaded: No other incomplete upload is left.
        """
        self._incomplete[upload] = None
        self._incomplete.move_to_end(upload)
        upload.num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self._limit_bytes:
            stalest = next(iter(self._incomplete))
            if stalest is upload:
                raise Overloaded("too many bodies are being received; try again later")
            stalest.is_evicted = True
            if not stalest.deadline.expired():  # in this very turn, and it has not heard yet
                stalest.deadline.reschedule(asyncio.get_running_loop().time())
            self.release(stalest)

    def complete(self, upload: Upload) -> None:
        """The whole body is here: it is held until it is released, and evicted no more."""
        self._incomplete.pop(upload, None)

    def release(self, upload: Upload) -> None:
        """Free what an upload holds; twice does no harm."""
        self._incomplete.pop(upload, None)
        self.num_bytes -= upload.num_bytes
        upload.num_bytes = 0


class BodyReader:
    """Reads bodies for one door."""

    def __init__(self, limit_bytes: int, timeout_s: float, wait_s: float) -> None:
        """Nothing is started until `start` or the first large body.

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
            PayloadTooLarge: More bytes than allowed; reading stops there.
            RequestTimeout: It arrived too slowly.
            Overloaded: No memory for it, or no turn in the parsing process.
            InvalidRequest: Not a JSON object, or too much in it.
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
        if len(data) > SMALL_BYTES:
            await self._check_in_child(data, request.state.identity.tenant)
        return parse(data)

    async def _check_in_child(self, data: bytes, tenant: str) -> None:
        """Parse a body in the other process first: what passes there is cheap to parse here."""
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
