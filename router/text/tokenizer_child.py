"""The process in which texts are tokenized and templates rendered, one JSON line at a time.

Owns the Hugging Face tokenizer and the chat templates of one model. Does not know requests. Its
input is not trusted: it limits memory itself, and the router limits time. `router.text.tokenizing`
starts it as `python -m router.text.tokenizer_child FOLDER MAX_CHARACTERS`.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from core import logs
from core.errors import InvalidRequest, PromptTooLong
from router.text.chat_template import ChatTemplates
from router.text.text_bounds import check_bytes

MAX_MEMORY_BYTES = 3 << 30


def answer(
    job: dict[str, Any], tokenizer: Tokenizer, templates: ChatTemplates, max_characters: int
) -> dict[str, Any]:
    """Do the job of one line.

    Raises:
        InvalidRequest: Names the field at fault.
        PromptTooLong: The rendered prompt cannot fit.
    """
    text = job.get("text")
    if text is None:
        text = templates.render(
            job["messages"],
            job["variables"],
            job["template"],
            adds_generation_prompt=job["adds_generation_prompt"],
            continues_final=job["continues_final"],
            max_characters=max_characters,
        )
        check_bytes(text, job.get("max_bytes", 0))
    encoding = tokenizer.encode(text, add_special_tokens=job["adds_special_tokens"])
    return (
        {"ids": encoding.ids, "tokens": encoding.tokens}
        if job.get("wants_tokens")
        else {"ids": encoding.ids}
    )


def main() -> None:
    """Answer until the router closes the pipe."""
    folder = Path(sys.argv[1])
    max_characters = int(sys.argv[2])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # some files were saved with a training run's settings
    tokenizer.no_padding()
    templates = ChatTemplates(folder)
    # After the model's files are loaded, which every text shares; a hostile template hits it alone.
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        try:
            reply = answer(json.loads(line), tokenizer, templates, max_characters)
        except PromptTooLong as error:
            reply = {"error": error.message, "is_too_long": True}
        except InvalidRequest as error:
            reply = {"error": error.message, "field": error.field}
        # Both are answers, not ends: the process goes on with the next text.
        except (MemoryError, RecursionError) as error:
            reply = {
                "error": f"needs too much memory ({type(error).__name__}); simplify it",
                "field": "messages",
            }
        try:
            sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            return  # the router is gone
        sys.stdout.flush()


if __name__ == "__main__":
    logs.configure("tokenizer")
    main()
