"""Fields of a body that are not read: refused by name, accepted without effect, or unknown.

Owns the lists of them; the API reference is made from these. Does not know the bodies' own fields
(`router.http.bodies`).
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from core.errors import InvalidRequest

MAX_SHOWN = 60
"""Characters of a refused value in its error."""
OFF: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "parallel_tool_calls": (None, True, False),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "functions": (None, []),
    "function_call": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
    "length_penalty": (None, 1),
    "use_beam_search": (None, False),
    "spaces_between_special_tokens": (None, True),
    "logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "structured_outputs": (None,),
    "documents": (None, []),
    "mm_processor_kwargs": (None,),
    "media_io_kwargs": (None,),
    "kv_transfer_params": (None,),
    "priority": (None, 0),
    "include_reasoning": (None, True),
    "repetition_detection": (None,),
    "logits_processors": (None,),
    "vllm_xargs": (None,),
    "echo": (None, False),
    "background": (None, False),
    "early_stopping": (None, False),
}
"""Known fields that are not supported, with the values that mean "off"."""
FREE = (
    "user",
    "metadata",
    "safety_identifier",
    "store",
    "verbosity",
)
"""Known fields that have no effect on an answer here."""
UNUSED = {"tools": "tool_choice", "functions": "function_call"}
"""Offers of tools, ignored where the other field says that none may be called."""
RENAMED = {
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "guided_decoding_backend": "structured_outputs",
}


def ignored_fields(body: BaseModel, *, is_strict: bool = False) -> list[str]:
    """Judge the fields of a body that are not read.

    Returns:
        The ignored ones: unknown fields, and tools that may not be called.

    Raises:
        InvalidRequest: A known field asks for something that is not supported, or a field is
            unknown and `is_strict` is set.
    """
    unknown = []
    extra = body.model_extra or {}
    for name, value in extra.items():
        if name in UNUSED and extra.get(UNUSED[name]) == "none":
            unknown.append(name)
            continue
        if name in RENAMED and value is not None:
            raise InvalidRequest(
                name, f"is now called {RENAMED[name]}, which is not supported yet; leave it out"
            )
        if name in OFF:
            if not any(value == off and type(value) is type(off) for off in OFF[name]):
                raise InvalidRequest(name, f"= {_shown(value)} is not supported; leave it out")
        elif name not in FREE and name not in RENAMED:
            if is_strict:
                raise InvalidRequest(name[:80], "is unknown, and router.strict refuses such fields")
            unknown.append(name)
    return unknown


def _shown(value: Any) -> str:  # noqa: ANN401 - whatever a client sent
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
