"""Secrets that a config names instead of holding them: `file:PATH` or `env:NAME`.

Owns the two forms and their reading. Does not know which settings are secrets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from core.errors import ConfigError

FILE, ENV = "file:", "env:"
MAX_SECRET_BYTES = 4096


def is_reference(value: str) -> bool:
    """Does a setting name a secret instead of holding it?"""
    return value.startswith((FILE, ENV))


def read_reference(setting: str, value: str, environment: Mapping[str, str] | None = None) -> str:
    """Return the secret that a setting names, or the setting's own value.

    Raises:
        ConfigError: The file or variable is not there on this machine, or is empty.
    """
    if not is_reference(value):
        return value
    kind, _, name = value.partition(":")
    if kind == "env":
        secret = (os.environ if environment is None else environment).get(name, "")
    else:
        try:
            with Path(name).open("rb") as file:
                # Bounded: the setting may name /dev/zero. Editors end a file with a newline.
                secret = file.read(MAX_SECRET_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{setting} is {value}, which cannot be read on this machine: {error}"
            ) from error
    if not secret:
        raise ConfigError(f"{setting} is {value}, which is empty or not set on this machine")
    return secret
