"""A client that speaks HTTP in bytes: a connection a request, and little work for each.

Owns the requests that the load benchmarks send to /v1/completions, and what each saw of its answer.
Does not know when requests are due.
"""

import asyncio
import json
import random
import string
import time
from dataclasses import dataclass, field
from itertools import pairwise

LETTERS = string.ascii_letters + string.digits + "     "
TIMEOUT_S = 60.0


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it; instants on the monotonic clock."""

    due_at: float
    sent_at: float = 0.0
    ended_at: float = 0.0
    status: int = 0
    code: str = ""
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    arrivals: list[float] = field(default_factory=list)
    events: list[bytes] = field(default_factory=list)
    """What came at each of the arrivals; read when the load is over."""

    @property
    def is_ok(self):
        return self.status == 200 and not self.code and bool(self.arrivals)

    @property
    def is_refusal(self):
        return self.status in (429, 503)

    @property
    def ttft_s(self):
        return self.arrivals[0] - self.sent_at

    @property
    def gaps_s(self):
        return [b - a for a, b in pairwise(self.arrivals)]

    @property
    def tokens(self):
        """(When, how many) came, where a token is a letter, as in the tiny model."""
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in self.events]
        return list(zip(self.arrivals, map(len, texts), strict=True))


class HttpClient:
    """Asks one router; `headers` go with every request."""

    def __init__(self, port, seed, headers=None, timeout_s=TIMEOUT_S):
        self.port = port
        self.rng = random.Random(seed)
        self._timeout_s = timeout_s
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())

    def body(self, num_tokens, num_output):
        """A prompt of one token a letter that nobody has sent before."""
        prompt = "".join(self.rng.choices(LETTERS, k=num_tokens))
        body = {"prompt": prompt, "max_tokens": num_output, "stream": True, "ignore_eos": True}
        return json.dumps({**body, "temperature": 0}).encode()

    def head(self, body):
        return (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{self._headers}\r\n"
        ).encode()

    async def ask(self, body, due_at=None, on_sent=None):
        """One request to its end; whatever goes wrong is in the outcome.

        `on_sent` is called with the outcome at once: who hangs up has what came until then.
        """
        now_s = time.monotonic()
        outcome = Outcome(now_s if due_at is None else due_at, sent_at=now_s)
        if on_sent is not None:
            on_sent(outcome)
        writer = None
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(self.head(body) + body)
                await self._read(reader, outcome)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            outcome.code = outcome.code or f"client: {type(error).__name__}"
        finally:
            if writer is not None:
                writer.close()
        outcome.ended_at = time.monotonic()
        return outcome

    async def _read(self, reader, outcome):
        head = await reader.readuntil(b"\r\n\r\n")
        outcome.status = int(head.split(b" ", 2)[1])
        lines = [line.partition(": ") for line in head.decode("latin1").split("\r\n")[1:] if line]
        outcome.headers = {name.lower(): value for name, _, value in lines}
        if outcome.status != 200:
            text = await reader.read()
            outcome.ended_at = time.monotonic()
            error = json.loads(text[text.index(b"{") : text.rindex(b"}") + 1])["error"]
            outcome.code, outcome.message = str(error["code"]), error["message"]
            return
        is_done = False
        async for line in reader:
            if line.startswith(b"data: {"):
                if line.startswith(b'data: {"error"'):
                    outcome.code = str(json.loads(line[6:])["error"]["code"])
                else:
                    outcome.arrivals.append(time.monotonic())
                    outcome.events.append(line)
            elif line.startswith(b"data: [DONE]"):
                is_done = True
        if not is_done and not outcome.code:
            outcome.code = "client: cut off"
