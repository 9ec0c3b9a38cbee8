"""Messages as a chat template sees them: the same as under transformers and the OpenAI servers.

Owns how nulls, content parts, tool calls, reasoning and developer messages are prepared. Does not
know Jinja beyond a template's shape.
"""

from __future__ import annotations

import json
from typing import Any

from core.errors import InvalidRequest
from router.text.template_shape import TemplateShape

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that clients give an assistant's reasoning; templates read the first or the second."""


def seen_messages(messages: list[Message], shape: TemplateShape) -> list[Message]:
    """Make new messages for a template of this shape; the given ones are unchanged.

    Raises:
        InvalidRequest: The arguments of a tool call are not a JSON object.
    """
    return [_seen(message, index, shape) for index, message in enumerate(messages)]


def last_text(message: Message) -> str | None:
    """Find the text that ends a seen message: its content, or the last part's text."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1]["text"] if content else None
    return content if isinstance(content, str) else None


def with_last_text(message: Message, text: str) -> Message:
    """Make a message that ends with another text."""
    content = message["content"]
    if isinstance(content, list):
        return {**message, "content": [*content[:-1], {**content[-1], "text": text}]}
    return {**message, "content": text}


def _seen(message: Message, index: int, shape: TemplateShape) -> Message:
    """Prepare one message. Nulls go: templates test for the key, and would print null as a word."""
    # Templates test whether a key is there; OpenAI's clients send null for what they leave out.
    seen = {name: value for name, value in message.items() if value is not None}
    reasoning = next((seen[name] for name in REASONING if name in seen), None)
    if reasoning is not None:
        # Models' templates disagree about the name; each finds its own.
        seen = {"thinking": reasoning, **seen, "reasoning_content": reasoning}
    if seen.get("role") == "developer" and not shape.knows_developer:
        # OpenAI renamed the role; many templates refuse the new name.
        seen["role"] = "system"
    seen["content"] = _content(seen.get("content", ""), shape)
    calls = seen.pop("tool_calls", None)
    if isinstance(calls, list):
        place = f"messages[{index}].tool_calls"
        calls = [_call(call, f"{place}[{number}]") for number, call in enumerate(calls)]
    if calls:  # an empty list means none, but a template may test for the key
        seen["tool_calls"] = calls
    return seen


def _content(content: object, shape: TemplateShape) -> object:
    if isinstance(content, list) and not shape.walks_parts:
        return "\n".join(part["text"] for part in content)
    if isinstance(content, str) and shape.walks_parts and not shape.takes_text:
        return [{"type": "text", "text": content}] if content else []
    return content


def _call(call: object, place: str) -> object:
    """Prepare a tool call: arguments arrive as JSON text, and templates expect the object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, dict):
        # OpenAI's clients send the arguments as text, and templates walk over them as an object.
        arguments = _object(arguments, f"{place}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _object(text: object, place: str) -> dict[str, Any]:
    if text in (None, ""):
        return {}
    try:
        tree = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(place, f"is not JSON: {error}; send a JSON object") from error
    if not isinstance(tree, dict):
        raise InvalidRequest(place, f"is a {type(tree).__name__}, must be a JSON object")
    return tree
