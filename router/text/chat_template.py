"""Messages to one prompt, with the model's own Jinja template in an immutable sandbox.

Owns finding, compiling and rendering templates, bounded in size (the process it runs in bounds time
and memory). Does not know tokens, nor how messages are prepared (`router.text.template_messages`).

Filters, globals, variables and whitespace rules are those of transformers' `apply_chat_template`,
which is the reference in the tests.
"""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from core.errors import InvalidRequest
from core.special_tokens import special_tokens
from router.text.template_messages import Message, last_text, seen_messages, with_last_text
from router.text.template_shape import TemplateShape, read_shape

MAX_TEMPLATE_CHARACTERS = 256 << 10
END_OF_FINAL = "[the last message ends here] "
"""Appended to a message that the model is to continue, to find its end in the prompt. The space
shows whether the template trims contents."""


class Generation(Extension):
    """`{% generation %}` marks assistant text for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> Any:  # noqa: ANN401
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: ANN401
    # As transformers': Jinja's own filter escapes for HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        # Transformers' settings, which every model's template was written for.
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols, Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    # In UTC: the router's zone is none of the client's business, and routers of two zones agree.
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now(
        tz=datetime.UTC
    ).strftime(form)
    # It makes text of any length from nothing.
    environment.globals.pop("lipsum", None)
    return environment


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> tuple[jinja2.Template, TemplateShape]:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            "chat_template", f"has {len(source)} characters, the limit is {MAX_TEMPLATE_CHARACTERS}"
        )
    try:
        tree = _environment().parse(source)
        shape = read_shape(tree)  # before the compiler folds constants
        return _environment().from_string(tree), shape
    except (jinja2.exceptions.TemplateError, RecursionError) as error:
        raise InvalidRequest("chat_template", f"is not a valid template: {error}") from error


class ChatTemplates:
    """The templates and special tokens of one model folder."""

    def __init__(self, folder: Path) -> None:
        """Read them from the folder's files, as far as these exist."""
        config = _read(folder / "tokenizer_config.json")
        self._special_tokens = special_tokens(config, _read(folder / "special_tokens_map.json"))
        self._source = config.get("chat_template") or ""
        if isinstance(self._source, list):
            # Older models have several: one for tools, say, beside the default.
            named = {entry["name"]: entry["template"] for entry in self._source}
            self._source = named.get("default") or next(iter(named.values()), "")
        # Newer models have it in a file of its own, which is the one to trust.
        file = folder / "chat_template.jinja"
        if file.is_file():
            self._source = file.read_text(encoding="utf-8")

    def render(
        self,
        messages: list[Message],
        variables: dict[str, Any],
        source: str = "",
        *,
        adds_generation_prompt: bool = True,
        continues_final: bool = False,
        max_characters: int,
    ) -> str:
        """Render a conversation.

        Args:
            messages: As the client sent them, contents as text, as text parts, or none.
            variables: The allowed `chat_template_kwargs`.
            source: A template to use instead of the model's.
            adds_generation_prompt: Open the assistant's turn.
            continues_final: Leave the last message open, for the model to continue.
            max_characters: Longest result.

        Raises:
            InvalidRequest: There is no template, it is broken, or it refuses these messages.
        """
        source = source or self._source
        if not source:
            raise InvalidRequest(
                "messages", "cannot be used: the model has no chat template; use /v1/completions"
            )
        template, shape = _compile(source)
        seen = seen_messages(messages, shape)
        final = last_text(seen[-1]) if continues_final else ""
        if final is None:
            raise _no_end()
        if continues_final:
            # The end is marked and found again: what a template puts behind the message is unknown.
            seen[-1] = with_last_text(seen[-1], final + END_OF_FINAL)
        names = {"tools": None, "documents": None, **self._special_tokens, **variables}
        names |= {"messages": seen, "add_generation_prompt": adds_generation_prompt}
        pieces: list[str] = []
        size = 0
        try:
            # Piece by piece: a template that prints without end is stopped at the limit.
            for piece in template.generate(names):
                size += len(piece)
                if size > max_characters:
                    raise InvalidRequest(
                        "messages", f"render to more than {max_characters} characters; shorten them"
                    )
                pieces.append(piece)
        except jinja2.exceptions.SecurityError as error:
            raise InvalidRequest("chat_template", f"does what is not allowed: {error}") from error
        except (
            jinja2.exceptions.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
        ) as error:
            raise InvalidRequest(
                "messages", f"are refused by the chat template: {error}"[:500]
            ) from error
        text = "".join(pieces)
        return _cut_at_end(text, final) if continues_final else text


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _cut_at_end(text: str, final: str) -> str:
    """End the prompt where the last message's content ends, as transformers does."""
    at = text.rfind(END_OF_FINAL.strip())
    if at < 0 or final.strip() not in text:
        raise _no_end()
    is_whole = text.startswith(END_OF_FINAL, at)
    return text[:at] if is_whole else text[:at].rstrip()


def _no_end() -> InvalidRequest:
    return InvalidRequest(
        "continue_final_message",
        "cannot be used: the chat template does not show the last message's content",
    )
