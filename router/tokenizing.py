"""Text and messages to token ids, in processes of their own, bounded in bytes, time and memory.

Owns the tokenizer processes: a hostile text or template can at worst kill one of them, never the
router or its event loop, and the others go on meanwhile. Does not know requests. Called by
`router.service`. The children run `router.tokenizer_child`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest, Overloaded, Unavailable
from core.types import ChatPrompt

MAX_TEXT_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20
MAX_WAITING = 256
START_TIMEOUT_S = 30.0


class _Child:
    """One process: one order at a time."""

    def __init__(self, folder: Path) -> None:
        """Nothing is started yet."""
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._ended: asyncio.subprocess.Process | None = None
        self.turn = asyncio.Lock()
        self.num_waiting = 0

    async def ask(self, line: bytes, timeout_s: float) -> bytes:
        """Send a line and wait for the answer; empty if the process died.

        Raises:
            TimeoutError: It took too long; the process is replaced.
        """
        process = await self.start()
        if process.stdin is None or process.stdout is None:
            return b""
        reply = b""
        try:
            async with asyncio.timeout(timeout_s):
                process.stdin.write(line)
                await process.stdin.drain()
                reply = await process.stdout.readline()
        except (ConnectionError, ValueError):
            return b""
        finally:
            if not reply:  # timed out, died, or the caller left mid-answer: the pipe is out of step
                self._kill()
        return reply

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process unless it runs, and wait until it is ready.

        Raises:
            Unavailable: It did not come up.
        """
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "router.tokenizer_child", str(self._folder), str(MAX_TEXT_BYTES),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_LINE_BYTES,
            )  # fmt: skip
            is_ready = False
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    is_ready = self._process.stdout is not None and bool(
                        await self._process.stdout.readline()
                    )
            except TimeoutError as error:
                raise Unavailable(
                    f"a tokenizer process was not ready within {START_TIMEOUT_S:g} s"
                ) from error
            finally:
                if not is_ready:
                    self._kill()
        if self._process is None:
            raise Unavailable("a tokenizer process ended before it was ready")
        return self._process

    def _kill(self) -> None:
        """End the process without waiting; the event loop reaps it."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            self._ended = process

    async def stop(self) -> None:
        """End the process."""
        self._kill()
        if self._ended is not None:
            await self._ended.wait()


class TokenizerPool:
    """The `Tokenizer` port over child processes; each order goes to the one with the shortest line."""

    def __init__(self, folder: Path, timeout_s: float, num_processes: int = 1) -> None:
        """Nothing is started until `start` or the first order."""
        self._timeout_s = timeout_s
        self._children = [_Child(folder) for _ in range(num_processes)]

    async def start(self) -> None:
        """Start the processes now, so that the first request does not wait for one."""
        for child in self._children:
            async with child.turn:
                await child.start()

    async def encode(self, text: str, *, adds_special_tokens: bool = True) -> list[int]:
        """Encode a text.

        Raises:
            InvalidRequest: Not valid Unicode, too long, or too slow.
            Overloaded: Too many orders wait.
        """
        reply = await self._ask(
            "prompt", {"text": text, "adds_special_tokens": adds_special_tokens}
        )
        return list(reply["ids"])

    async def encode_with_tokens(
        self, text: str, *, adds_special_tokens: bool
    ) -> tuple[list[int], list[str]]:
        """Encode a text and name each token as the vocabulary does.

        Raises:
            ServingError: As `encode`.
        """
        order = {"text": text, "adds_special_tokens": adds_special_tokens, "wants_tokens": True}
        reply = await self._ask("prompt", order)
        return list(reply["ids"]), list(reply["tokens"])

    async def encode_chat(self, chat: ChatPrompt) -> list[int]:
        """Render messages with the chat template and encode the result.

        Raises:
            InvalidRequest: Names what the template, or a limit, refuses.
            Overloaded: Too many orders wait.
        """
        order = {
            "messages": chat.messages, "variables": chat.variables, "template": chat.template,
            "adds_generation_prompt": chat.adds_generation_prompt, "continues_final": chat.continues_final,
            "adds_special_tokens": chat.adds_special_tokens,
        }  # fmt: skip
        reply = await self._ask("messages", order)
        return list(reply["ids"])

    async def _ask(self, field: str, order: dict[str, Any]) -> dict[str, Any]:
        line = _line(field, order)
        child = min(self._children, key=lambda c: c.num_waiting)
        if child.num_waiting >= MAX_WAITING:
            raise Overloaded(f"{child.num_waiting} texts wait to be tokenized; try again later")
        child.num_waiting += 1
        try:
            async with child.turn:
                answer = await child.ask(line, self._timeout_s)
        except TimeoutError as error:
            raise InvalidRequest(
                field, f"took longer than {self._timeout_s:g} s to tokenize; shorten it"
            ) from error
        finally:
            child.num_waiting -= 1
        if not answer:
            raise Unavailable("the tokenizer process ended while it worked on this text; try again")
        reply: dict[str, Any] = json.loads(answer)
        if "error" in reply:
            raise InvalidRequest(
                reply["field"], str(reply["error"]).removeprefix(f"{reply['field']} ")
            )
        return reply

    async def stop(self) -> None:
        """End the processes."""
        for child in self._children:
            await child.stop()


def _line(field: str, order: dict[str, Any]) -> bytes:
    try:
        line = json.dumps(order, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, "has a lone surrogate; send valid Unicode") from error
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(field, "is nested too deeply") from error
    if len(line) > MAX_TEXT_BYTES:
        raise InvalidRequest(field, f"has {len(line)} bytes, the limit is {MAX_TEXT_BYTES}")
    return line
