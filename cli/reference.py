"""The API reference, written from the code that serves it: `make reference`.

Owns docs/reference.md. Does not know how anything works: fields, defaults and words are those of
the bodies, the proto file, the config tree, the error tree, the metrics table and the commands. A
test compares the file with what this module makes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from cli.main import app
from core import events, metrics
from core.config import BatonConfig, TierConfig
from core.config.renamed import RENAMED as RENAMED_KEYS
from core.errors import all_errors
from core.types import PHASES, TTFT_PHASES
from router import refusals
from router.access.identities import RIGHTS, Right
from router.http.app import POSTS, READERS
from router.http.bodies import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    ExplainBody,
    MeasureBody,
    TokenizeBody,
    TokenizeChatBody,
)
from router.http.other_fields import FREE, OFF, RENAMED

X_REQUEST_ID = (
    "what the caller calls the action: echoed, also on errors, and logged as `correlation_id`; "
    "calls with the same one are different requests; absent: the reply has the request's id"
)
IDEMPOTENCY_KEY = (
    "the request's id, as `request_id` in the body: a second one while the first runs is refused "
    "(`duplicate_request`), and without a seed both have the same randomness"
)
EVENTS = """What every process logs to standard error, one line each (`log.format`: text or json).
All have `time`, `level`, `event`, `process` (up, router, prefill, decode, rank, sidecar, tokenizer,
body-reader, orphan-reaper, bench) and `pid`.
"""
REFUSALS = """Codes of the HTTP and gRPC servers alone. `baton_refusals_total` counts by them and by
the codes above; the log has them as `outcome`. Without a status there is no answer: the connection
or call just ends.
"""
ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "reference.md"
PROTO = ROOT / "protos" / "baton" / "v1" / "generation.proto"
BODIES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("POST /v1/chat/completions", ChatBody),
    ("POST /v1/completions", CompletionBody),
    ("POST /tokenize (text)", TokenizeBody),
    ("POST /tokenize (conversation)", TokenizeChatBody),
    ("POST /detokenize", DetokenizeBody),
    ("POST /links", MeasureBody),
)
MORE_OF_EXPLAIN = """The body of a completion or of a chat completion, and:

"""
ROLES = """The last column has the roles of keys that may call it (`baton keys add --role`); without
keys everybody may. GET paths answer HEAD too.
"""
HEAD = """# Reference

Made from the code by `make reference`; do not edit. The walk of a request is in
[request-life.md](request-life.md), what has been run is in [compatibility.md](compatibility.md).
"""


def _table(
    head: tuple[str, ...], rows: Iterator[tuple[object, ...]] | list[tuple[object, ...]]
) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return (
        "\n".join(
            "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in lines
        )
        + "\n"
    )


def _bare(annotation: Any) -> Any:  # noqa: ANN401
    """A type without what validates it."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _bare(arguments[0])
    if origin in (Union, UnionType):
        return Union[tuple(map(_bare, arguments))]  # noqa: UP007 - made of parts
    if origin in (list, tuple, dict):
        return origin[tuple(map(_bare, arguments))]
    return annotation


def _kind(annotation: Any) -> str:  # noqa: ANN401
    """A type in the reader's words."""
    annotation = _bare(annotation)
    text = getattr(annotation, "__name__", "") if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"(?:typing|router\.http\.\w+|core\.config\.\w+)\.", "", text).replace(
        " | None", ""
    )
    text = re.sub(r"Union\[float, int(, NoneType)?\]", "number", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1", text)
    text = re.sub(r"Union\[(.*), NoneType\]", r"\1", text)
    return f"`{text}`"


def _endpoints() -> Iterator[tuple[object, ...]]:
    for path, method, _, right in POSTS:
        yield f"`POST {path}`", _meaning(method), _roles(right)
    for path, method, needed in READERS:
        yield f"`GET {path.replace(':path', '')}`", _meaning(method), _roles(needed)


def _meaning(method: Callable[..., Any]) -> str:
    return (method.__doc__ or "").splitlines()[0].partition(": ")[2].rstrip(".")


def _roles(right: Right | None) -> str:
    if right is None:
        return "none needed"
    return ", ".join(role.value for role, rights in RIGHTS.items() if right in rights)


def _fields(
    model: type[BaseModel], besides: type[BaseModel] = BaseModel
) -> Iterator[tuple[object, ...]]:
    for name, info in model.model_fields.items():
        if name in besides.model_fields:
            continue
        needed = "yes" if info.is_required() else ""
        yield f"`{name}`", _kind(info.annotation), needed, info.description or ""


def _config(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[object, ...]]:
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _config(kind, f"{prefix}{name}.")
        elif get_origin(kind) is dict and issubclass(get_args(kind)[1], BaseModel):
            yield from _tiers(f"{prefix}{name}.NAME.", info.get_default(call_default_factory=True))
        else:
            default = info.get_default(call_default_factory=True)
            yield f"`{prefix}{name}`", _kind(kind), f"`{default}`", info.description or ""


def _tiers(prefix: str, defaults: dict[str, TierConfig]) -> Iterator[tuple[object, ...]]:
    """A tier's settings, with the defaults of the tiers that are always there."""
    for name, info in TierConfig.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _config(kind, f"{prefix}{name}.")
            continue
        default = info.get_default(call_default_factory=True)
        own = [
            f"; {tier}: `{value}`"
            for tier, settings in defaults.items()
            if (value := getattr(settings, name)) != default
        ]
        yield (
            f"`{prefix}{name}`",
            _kind(info.annotation),
            f"`{default}`{''.join(own)}",
            (info.description or ""),
        )


def _renamed() -> str:
    return ", ".join(
        f"`{old}` (now `{old.rpartition('.')[0]}.{name}`)" for old, name in RENAMED_KEYS.items()
    )


def _proto() -> str:
    """Calls and messages with their comments, as they stand in the proto file."""
    out = []
    comments = []
    message = ""
    for line in PROTO.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("//"):
            comments.append(text.removeprefix("//").strip())
            continue
        if match := re.match(r"rpc (\w+)\((\w+)\) returns \((stream )?(\w+)\)", text):
            arrow = f"stream of `{match[4]}`" if match[3] else f"`{match[4]}`"
            out.append(f"- **{match[1]}** (`{match[2]}`) returns {arrow}. {' '.join(comments)}")
        elif match := re.match(r"(message|enum) (\w+) \{(\})?", text):
            message = match[2]
            out.append(f"\n### {message}\n\n{' '.join(comments)}".rstrip() + "\n")
        elif (
            match := re.match(
                r"(?:(map<[^>]*>|(?:optional |repeated )?[\w.]+) )?(\w+) = (\d+);", text
            )
        ) and message:
            kind = f"`{match[1].strip()}` " if match[1] else ""
            out.append(
                f"- `{match[2]}` {kind}= {match[3]}{'. ' + ' '.join(comments) if comments else ''}"
            )
        comments = []
    return "\n".join(out) + "\n"


def _commands(
    group: Any = None,  # noqa: ANN401
    prefix: str = "baton ",
) -> Iterator[tuple[object, ...]]:
    """Every command, those of groups by their whole name."""
    parent: Any = group or typer.main.get_command(app)
    for name, one in parent.commands.items():
        if hasattr(one, "commands"):
            yield from _commands(one, f"{prefix}{name} ")
            continue
        options = ", ".join(
            f"`{max(p.opts, key=len)}`" for p in one.params if p.opts[0].startswith("-")
        )
        yield f"`{prefix}{name}`", (one.help or "").splitlines()[0], options


def render() -> str:
    """Make the whole text."""
    parts = [
        HEAD,
        "\n## HTTP\n\n",
        ROLES,
        "\n",
        _table(("endpoint", "meaning", "roles"), _endpoints()),
    ]
    for title, model in BODIES:
        parts += [
            f"\n### {title}\n\n",
            _table(("field", "type", "needed", "meaning"), _fields(model)),
        ]
    parts += [
        "\n### POST /prefix-index/explain\n\n",
        MORE_OF_EXPLAIN,
        _table(
            ("field", "type", "needed", "meaning"),
            _fields(ExplainBody, besides=CompletionBody),
        ),
    ]
    off = "; ".join(
        f"`{name}` ({', '.join(f'`{value!r}`' for value in values)})"
        for name, values in sorted(OFF.items())
    )
    parts += [
        "\n### Other fields\n\n",
        f'Known, not supported, refused by name unless "off" (in brackets): {off}.\n\n',
        f"Known and without effect here: {', '.join(f'`{name}`' for name in FREE)}.\n\n",
        f"Old names, refused with the new one: {', '.join(f'`{name}`' for name in RENAMED)}.\n\n",
        (
            "Unknown: ignored and listed in the reply's header `x-baton-ignored-params`; with "
            "`router.strict`, refused.\n"
        ),
        "\n### Headers\n\n",
        _table(
            ("header", "direction", "meaning"),
            [
                ("`x-request-id`", "both", X_REQUEST_ID),
                ("`idempotency-key`", "request", IDEMPOTENCY_KEY),
                (
                    "`x-baton-timing: 1`",
                    "request",
                    "`timing` in the reply or the last chunk: where the time went",
                ),
                (
                    "`x-baton-tier`",
                    "both",
                    "the tier, like `service_tier` in the body; in a reply that which served",
                ),
                (
                    "`x-baton-router`",
                    "reply",
                    "the router that served: it alone can explain the request (gRPC: a trailer)",
                ),
                ("`traceparent`, `tracestate`", "request", "W3C trace context"),
                ("`Server-Timing`", "reply", "the phases of a plain reply, which browsers show"),
                (
                    "`x-should-retry`, `Retry-After`, `retry-after-ms`",
                    "reply",
                    "whether and when the same request may succeed",
                ),
            ],
        ),
        "\n### Phases\n\n",
        (
            f"{' + '.join(TTFT_PHASES)} = TTFT; with {', '.join(PHASES[len(TTFT_PHASES) :])} they "
            "make the end-to-end time.\n"
        ),
        "\n## gRPC: `baton.v1.Generation`\n\n",
        _proto(),
        "\n## Errors\n\n",
        _table(
            ("error", "code", "HTTP", "gRPC", "meaning"),
            [
                (
                    f"`{e.__name__}`",
                    f"`{e.code}`",
                    e.http_status,
                    e.grpc_status,
                    (e.__doc__ or "").splitlines()[0],
                )
                for e in all_errors()
            ],
        ),
        "\n### Refusals without an error\n\n",
        REFUSALS,
        "\n",
        _table(
            ("code", "HTTP", "gRPC", "meaning"),
            [(f"`{r.code}`", r.http_status or "", r.grpc_status, r.meaning) for r in refusals.ALL],
        ),
        "\n## Metrics\n\n",
        _table(
            ("metric", "kind", "labels", "meaning"),
            [(f"`{m.name}`", m.kind, ", ".join(m.labels), m.description) for m in metrics.ALL],
        ),
        "\n## Events\n\n",
        EVENTS,
        "\n",
        _table(
            ("event", "level", "fields", "meaning"),
            [
                (
                    f"`{e.name}`",
                    logging.getLevelName(e.level).lower(),
                    ", ".join(e.fields),
                    e.meaning,
                )
                for e in events.ALL
            ],
        ),
        "\n## Commands\n\n",
        _table(("command", "what", "options"), _commands()),
        "\n## Config\n\n",
        "YAML, then `BATON_ROUTER__HTTP_PORT=8001`, then flags; later wins.\n\n",
        _table(("key", "type", "default", "meaning"), _config(BatonConfig)),
        f"\nOld names, taken for one more release with a warning: {_renamed()}.\n",
    ]
    return "".join(parts)


if __name__ == "__main__":
    OUT.write_text(render(), encoding="utf-8")
