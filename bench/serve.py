"""`baton bench serve`: offer a load to any OpenAI-style server, and record its answers.

Owns the sending. Does not know what the figures mean (`bench.report`) or where requests come from
(`bench.load`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from bench.load import Planned
from bench.report import Sample
from client.endpoints import Endpoints, authorization
from core.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0
MAX_ERROR_CHARACTERS = 120


class LoadClient:
    """Streams completions, and records when chunks arrive."""

    def __init__(self, url: str, model: str, session: aiohttp.ClientSession) -> None:
        """Send to `url`; an empty model means the first one served."""
        self._url = url.rstrip("/")
        self._model = model
        self._session = session
        self.start = 0.0

    async def card(self) -> dict[str, Any]:
        """Return the model's card.

        Raises:
            ConfigError: Nobody answers there, or the model is not served.
        """
        try:
            async with self._session.get(f"{self._url}/v1/models") as reply:
                cards: list[dict[str, Any]] = (await reply.json())["data"]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"no OpenAI-style server answers at {self._url}: {error}") from error
        found = [card for card in cards if self._model in ("", card["id"])]
        if not found:
            raise ConfigError(f"model {self._model!r} is not served at {self._url}")
        self._model = str(found[0]["id"])
        return found[0]

    async def send(self, planned: Planned, scheduled_at: float) -> Sample:
        """Send one request and read it to its end; failures are samples too."""
        sample = Sample(
            planned.index, scheduled_at, sent_at=self.now_s(), input_tokens=len(planned.prompt)
        )
        body = {
            "model": self._model,
            "prompt": list(planned.prompt),
            "max_tokens": planned.output_tokens,
            # Greedy and of fixed length: every run offers the same load.
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as reply:
                if reply.status != 200:
                    sample.error = (
                        f"HTTP {reply.status}: {(await reply.text())[:MAX_ERROR_CHARACTERS]}"
                    )
                else:
                    async for line in reply.content:
                        self._note(sample, line)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            sample.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARACTERS]
        if not sample.error and not sample.arrivals:
            sample.error = "the stream ended without a token"
        sample.ended_at = self.now_s()
        return sample

    def _note(self, sample: Sample, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        chunk = json.loads(line[6:])
        if chunk.get("error"):
            sample.error = str(chunk["error"].get("code") or chunk["error"].get("message"))[
                :MAX_ERROR_CHARACTERS
            ]
        # A first chunk without text has a token whose character is not complete.
        if chunk.get("choices") and (chunk["choices"][0].get("text") or not sample.arrivals):
            sample.arrivals.append(self.now_s())
        if usage := chunk.get("usage"):
            sample.input_tokens = usage["prompt_tokens"]
            sample.output_tokens = usage["completion_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get(
                "cached_tokens"
            ) or 0

    def now_s(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.start


async def run(
    url: str,
    model: str,
    make_load: Callable[[dict[str, Any]], list[Planned]],
    concurrency: int,
    timeout_s: float,
    on_done: Callable[[Sample], None],
    access: Endpoints,
) -> list[Sample]:
    """Offer a load.

    Args:
        url: Of the server, without `/v1`.
        model: Empty: the first one served.
        make_load: Makes the requests from the model's card.
        concurrency: Most requests in flight; 0: as many as are due.
        timeout_s: Of one request.
        on_done: Called with each sample.
        access: Whom to trust.

    Raises:
        ConfigError: The server does not answer.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    # One connection for each request, as separate users have; some servers close idle ones without
    # notice.
    connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=access.context)
    async with aiohttp.ClientSession(
        # A small buffer would slow down a server that answers in bursts.
        headers=authorization(),
        timeout=timeout,
        connector=connector,
        read_bufsize=1 << 20,
    ) as session:
        client = LoadClient(url, model, session)
        load = make_load(await client.card())
        room = asyncio.Semaphore(concurrency or len(load) or 1)
        samples: list[Sample] = []

        async def one(planned: Planned, scheduled_at: float) -> None:
            try:
                sample = await client.send(planned, scheduled_at)
            finally:
                room.release()
            samples.append(sample)
            on_done(sample)

        client.start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for planned in load:
                if planned.due_s is not None:
                    await asyncio.sleep(max(0.0, planned.due_s - client.now_s()))
                await room.acquire()
                # The due time: a client that sends late must not flatter the server.
                scheduled_at = client.now_s() if planned.due_s is None else planned.due_s
                tasks.create_task(one(planned, scheduled_at))
        return sorted(samples, key=lambda s: s.index)
