"""Text and messages to token ids, in child processes, bounded in bytes, time and memory.

Owns the jobs for the tokenizer processes: a hostile text or template can at worst kill one of them,
never the router or its event loop, and the others continue. A text that cannot fit is refused by
its length. Does not know requests. The children run `router.text.tokenizer_child`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import InvalidRequest, PromptTooLong, Unavailable
from core.types import ChatPrompt
from router.child_pool import ChildPool
from router.text.text_bounds import check_bytes

MAX_TEXT_BYTES = 4 << 20


class TokenizerPool:
    """The `Tokenizer` port over child processes."""

    def __init__(
        self,
        folder: Path,
        timeout_s: float,
        num_processes: int = 1,
        wait_s: float = 30.0,
    ) -> None:
        """Prepare; `start` or the first text starts the processes.

        Args:
            folder: The model's.
            timeout_s: Longest time for one text.
            num_processes: How many.
            wait_s: Longest wait for a free one.
        """
        self._timeout_s = timeout_s
        command = ["router.text.tokenizer_child", str(folder), str(MAX_TEXT_BYTES)]
        self._children = ChildPool(command, num_processes, timeout_s, wait_s)

    async def start(self) -> None:
        """Start the processes now, so that the first request does not wait for one."""
        await self._children.start()

    async def encode(
        self,
        text: str,
        *,
        adds_special_tokens: bool = True,
        tenant: str = "",
        max_bytes: int = 0,
    ) -> list[int]:
        """Encode a text.

        Raises:
            PromptTooLong: It has too many bytes to fit; nothing was tokenized.
            InvalidRequest: It is not valid Unicode, too long, or too slow.
            Overloaded: Too many texts wait.
        """
        check_bytes(text, max_bytes)
        job = {"text": text, "adds_special_tokens": adds_special_tokens}
        reply = await self._ask("prompt", job, tenant)
        return list(reply["ids"])

    async def encode_with_tokens(
        self, text: str, *, adds_special_tokens: bool, tenant: str = ""
    ) -> tuple[list[int], list[str]]:
        """Encode a text and name each token as the vocabulary does.

        Raises:
            ServingError: As `encode`.
        """
        job = {"text": text, "adds_special_tokens": adds_special_tokens, "wants_tokens": True}
        reply = await self._ask("prompt", job, tenant)
        return list(reply["ids"]), list(reply["tokens"])

    async def encode_chat(
        self, chat: ChatPrompt, *, tenant: str = "", max_bytes: int = 0
    ) -> list[int]:
        """Render messages with the chat template and encode the result.

        Raises:
            PromptTooLong: The rendered text has too many bytes to fit; it was not tokenized.
            InvalidRequest: Names what the template, or a limit, refuses.
            Overloaded: Too many texts wait.
        """
        job = {
            "messages": chat.messages,
            "variables": chat.variables,
            "template": chat.template,
            "adds_generation_prompt": chat.adds_generation_prompt,
            "continues_final": chat.continues_final,
            "adds_special_tokens": chat.adds_special_tokens,
            "max_bytes": max_bytes,
        }
        reply = await self._ask("messages", job, tenant)
        return list(reply["ids"])

    async def _ask(self, field: str, job: dict[str, Any], tenant: str) -> dict[str, Any]:
        try:
            answer = await self._children.ask(_line(field, job), tenant)
        except TimeoutError as error:
            raise InvalidRequest(
                field, f"took longer than {self._timeout_s:g} s to tokenize; shorten it"
            ) from error
        if not answer:
            raise Unavailable("the tokenizer process ended while it worked on this text; try again")
        reply: dict[str, Any] = json.loads(answer)
        if reply.get("is_too_long"):
            raise PromptTooLong(str(reply["error"]))
        if "error" in reply:
            raise InvalidRequest(
                reply["field"], str(reply["error"]).removeprefix(f"{reply['field']} ")
            )
        return reply

    async def stop(self) -> None:
        """End the processes."""
        await self._children.stop()


def _line(field: str, job: dict[str, Any]) -> bytes:
    try:
        # One line is one job: JSON escapes the newlines within.
        line = json.dumps(job, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, "has a lone surrogate; send valid Unicode") from error
    except (RecursionError, ValueError) as error:
        raise InvalidRequest(field, "is nested too deeply") from error
    if len(line) > MAX_TEXT_BYTES:
        raise InvalidRequest(field, f"has {len(line)} bytes, the limit is {MAX_TEXT_BYTES}")
    return line
