"""One JSON object in a model folder, read with a limit and refused by name.

Owns reading it. Does not know what it means.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from core.errors import ModelLoadError

MAX_JSON_BYTES = 256 << 20
"""Tokenizers of large vocabularies have more than 30 MiB."""


def read_json(path: Path) -> dict[str, Any]:
    """Read one object.

    Raises:
        ModelLoadError: Missing, too large, not JSON or no object; names folder and file.
    """
    name = f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadError(f"{name} has more than {MAX_JSON_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{name} cannot be read: {error.strerror}") from error
    # Brackets nested some thousand deep end the parser's recursion.
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{name} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ModelLoadError(f"{name} holds a {type(tree).__name__}, must be an object")
    return tree


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Read one object; a file that is not there is an empty one.

    Raises:
        ModelLoadError: As in `read_json`.
    """
    return read_json(path) if path.exists() else {}
