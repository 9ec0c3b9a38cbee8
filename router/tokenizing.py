"""Text to token ids, in a process of its own, bounded in bytes, time and memory.

Owns the tokenizer process: a hostile text can at worst kill it, never the router or its event
loop. Does not know requests. Called by `router.service`. The child half of this module runs as
`python -m router.tokenizing FOLDER`, one JSON line per text.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from pathlib import Path

from core.errors import InvalidRequest, Overloaded

MAX_TEXT_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20
MAX_MEMORY_BYTES = 4 << 30
MAX_WAITING = 256


class TokenizerProcess:
    """The `Tokenizer` port over a child process; one text at a time, the others wait in line."""

    def __init__(self, folder: Path, timeout_s: float) -> None:
        """Nothing is started until the first text."""
        self._folder, self._timeout_s = folder, timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self.num_restarts = 0

    async def start(self) -> None:
        """Start the child now, so that the first request does not wait for it."""
        async with self._turn:
            await self._child()

    async def encode(self, text: str) -> list[int]:
        """Encode a text.

        Raises:
            InvalidRequest: Not UTF-8, too long, or too slow; the child is replaced if need be.
            Overloaded: Too many texts wait.
        """
        try:
            num_bytes = len(text.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                "prompt", f"has a lone surrogate at character {error.start}; send valid Unicode"
            ) from error
        if num_bytes > MAX_TEXT_BYTES:
            raise InvalidRequest("prompt", f"has {num_bytes} bytes, the limit is {MAX_TEXT_BYTES}")
        if self._num_waiting >= MAX_WAITING:
            raise Overloaded(f"{self._num_waiting} texts wait to be tokenized; try again later")
        self._num_waiting += 1
        try:
            async with self._turn:
                return await self._ask(text)
        finally:
            self._num_waiting -= 1

    async def _ask(self, text: str) -> list[int]:
        process = await self._child()
        if process.stdin is None or process.stdout is None:
            raise InvalidRequest("prompt", "could not be tokenized")
        is_whole = False
        try:
            async with asyncio.timeout(self._timeout_s):
                process.stdin.write(json.dumps(text).encode() + b"\n")
                await process.stdin.drain()
                line = await process.stdout.readline()
            is_whole = bool(line)
        except TimeoutError as error:
            raise InvalidRequest("prompt", f"took longer than {self._timeout_s:g} s to tokenize; shorten it") from error
        except (ConnectionError, ValueError) as error:
            raise InvalidRequest("prompt", "could not be tokenized") from error
        finally:
            if not is_whole:  # timed out, died, or the caller left mid-answer: the pipe is out of step
                self._replace()
        if not line:
            raise InvalidRequest("prompt", "could not be tokenized")
        ids: list[int] = json.loads(line)
        return ids

    async def _child(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router.tokenizing", str(self._folder),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE_BYTES,
            )  # fmt: skip
        return self._process

    def _replace(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            self.num_restarts += 1

    async def stop(self) -> None:
        """End the child."""
        process = self._process
        self._replace()
        if process is not None:
            await process.wait()


def _serve(folder: Path) -> None:
    """The child: read a text, write its ids, until the router lets go of the pipe."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - only the child needs it here

    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line in sys.stdin.buffer:
        ids = tokenizer.encode(json.loads(line)).ids
        sys.stdout.write(json.dumps(ids) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
