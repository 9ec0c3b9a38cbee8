"""How every process logs: one record a line on standard error, as text or as JSON.

Owns the two formats, their escapes, and the bounded queue to the thread that writes, so that a
blocked pipe never blocks a loop. Does not know which events there are (`core.events`).

A record is one line, whatever a client wrote: control characters are escaped. The one exception is
the traceback of a bug as text, whose lines begin with spaces and a bar, as no record does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import re
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

from core import events

FORMAT_VARIABLE = "BATON_LOG__FORMAT"
LEVEL_VARIABLE = "BATON_LOG__LEVEL"
"""The settings `log.format` and `log.level`, as the config's own environment names them."""
MAX_WAITING_LINES = 4096
MAX_TRACEBACK_CHARACTERS = 16 << 10
CLOSE_TIMEOUT_S = 1.0
_PLAIN = re.compile(r"[\w./:@+%~-]+", re.ASCII)
_SECRET = re.compile(
    r"\b(bt-[0-9a-f]{8}-)[0-9a-f]{32}|(://[^/\s@:\"]{0,64}:)[^/\s@\"]{1,256}(?=@)", re.ASCII
)
"""An API key, or the password in a URL: neither belongs in a log, whoever put it there."""


class _Format(logging.Formatter):
    """Turns a record into fields."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._source = {"process": process, "pid": os.getpid()}

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """What every line begins with, then the fields of the event or the message."""
        known: str | None = getattr(record, "event", None)
        plain = events.BUG.name if record.exc_info else events.MESSAGE.name
        fields = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "event": known or plain,
            **self._source,
        }
        if known:
            fields |= getattr(record, "fields", {})
        else:
            fields |= {"logger": record.name, "message": _message(record)}
        if record.exc_info:
            # Its end, which names the error.
            fields["traceback"] = self.formatException(record.exc_info)[-MAX_TRACEBACK_CHARACTERS:]
        return fields


class JsonFormat(_Format):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return _without_secrets(_json(self.fields(record)))


class TextFormat(_Format):
    """Time, level, process, event, then `name=value` each; what is not plain is quoted as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = self.fields(record)
        time, level, event = (fields.pop(name) for name in ("time", "level", "event"))
        process, pid = (fields.pop(name) for name in ("process", "pid"))
        traceback = fields.pop("traceback", "")
        shown = "".join(f" {name}={_value(value)}" for name, value in fields.items())
        lines = [f"{time} {level.upper():7} {process}[{pid}] {event}{shown}"]
        lines += [f"  | {_json(line)[1:-1]}" for line in traceback.splitlines()]
        return _without_secrets("\n".join(lines))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit, or cannot be shown
        return str(record.msg)  # still worth a line: its caller must not fail for it


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _value(value: object) -> str:
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) else _json(value)
    return _json(value)


def _without_secrets(text: str) -> str:
    return _SECRET.sub(lambda found: f"{found[1] or found[2]}***", text)


class _Writer(logging.Handler):
    """Hands lines to a thread; drops them when it is behind, and logs how many."""

    def __init__(self, formatter: logging.Formatter, stream: TextIO) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        # This kind alone may be entered again by the thread that is in it: what the collector of
        # garbage ends may log, in the midst of anything.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._num_dropped = 0
        self._num_reported = 0
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue without waiting."""
        line = self.format(record)
        is_own = threading.current_thread() is self._thread  # how many were dropped: never dropped
        if is_own or self._lines.qsize() < MAX_WAITING_LINES:
            self._lines.put(line)
        else:
            self._num_dropped += 1

    def _write(self) -> None:
        is_closing = False
        while not (is_closing and self._lines.empty()):
            line = self._lines.get()
            if line is None:
                is_closing = True
                continue
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk, a closed pipe: nothing else is lost
                self._num_dropped += 1
                continue
            num_dropped = self._num_dropped - self._num_reported
            if num_dropped:
                self._num_reported += num_dropped
                events.LINES_DROPPED.log(lines=num_dropped)

    def close(self) -> None:
        """Write what is queued, as far as somebody reads it, and end the thread."""
        self._lines.put(None)
        self._thread.join(CLOSE_TIMEOUT_S)
        super().close()


def configure(process: str, style: str = "", level: str = "") -> None:
    """Log to standard error from now on; children of this process will do as it does.

    Args:
        process: What this process is, for every line: up, router, prefill, rank and so on.
        style: text or json; auto: text on a terminal, JSON elsewhere; empty: the environment's.
        level: Events below it are dropped: info, warning or error; empty: the environment's.
    """
    style = style or os.environ.get(FORMAT_VARIABLE, "auto")
    level = level or os.environ.get(LEVEL_VARIABLE, "info")
    if style == "auto":
        style = "text" if sys.stderr is not None and sys.stderr.isatty() else "json"
    # Through the environment, because children of children log like this, too.
    os.environ[FORMAT_VARIABLE] = style
    os.environ[LEVEL_VARIABLE] = level
    # gRPC's core has a log of its own, in its own words: a line for every stranger's bad handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    close()
    if sys.stderr is not None:
        made = TextFormat(process) if style == "text" else JsonFormat(process)
        logging.getLogger().addHandler(_Writer(made, sys.stderr))
    logging.getLogger().setLevel(logging.WARNING)
    events.LOGGER.setLevel(level.upper())
    # Libraries warn on standard error, in no format of ours.
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught
    threading.excepthook = _uncaught_in_thread


def close() -> None:
    """Write what is queued and stop: before a process leaves without its ordinary end."""
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, _Writer):
            logging.getLogger().removeHandler(handler)
            handler.close()


atexit.register(close)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:  # noqa: ANN401
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger(__name__).critical("the process ends by a bug", exc_info=(kind, error, trace))


def _uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else "?"
        logging.getLogger(__name__).error("thread %s ends by a bug", name, exc_info=args.exc_value)
