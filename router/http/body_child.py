"""The process that parses large bodies first: a malformed or oversized one ends here.

Owns the parsing of untrusted JSON; it limits memory itself, and the router limits time. Does not
know fields. `router.http.body_reading` starts it as `python -m router.http.body_child`. A job is a
length of 4 bytes (big-endian) and the body; the answer is one line of JSON.
"""

from __future__ import annotations

import gc
import json
import resource
import sys

from core import logs
from core.errors import InvalidRequest
from router.body_limits import check_size

MAX_MEMORY_BYTES = 2 << 30


def parse(data: bytes) -> dict[str, object]:
    """Parse a JSON object.

    Raises:
        InvalidRequest: The bytes are no JSON object.
    """
    try:
        body = json.loads(data)
    except RecursionError as error:
        raise InvalidRequest("body", "is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequest("body", f"is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidRequest("body", f"is a JSON {type(body).__name__}, must be an object")
    return body


def verdict(data: bytes) -> dict[str, str]:
    """Check a body; return the field and the fact, or nothing if it is valid."""
    try:
        check_size(parse(data))
    except InvalidRequest as error:
        return {"field": error.field, "fact": error.message.removeprefix(f"{error.field} ")}
    except (MemoryError, RecursionError):
        return {"field": "body", "fact": "needs too much memory; send less"}
    return {}


def main() -> None:
    """Answer until the router closes the pipe."""
    gc.disable()  # parsed JSON has no cycles, and the search for them takes time
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while len(size := sys.stdin.buffer.read(4)) == 4:
        data = sys.stdin.buffer.read(int.from_bytes(size, "big"))
        try:
            sys.stdout.write(json.dumps(verdict(data)) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:
            return  # the router is gone


if __name__ == "__main__":
    logs.configure("body-reader")
    main()
