"""The secrets that the processes of one cluster share and nobody else knows.

Owns which settings they are, how they are made when the config has none (the workers' key, and the
key from which the routers derive seeds), and how they travel. Does not know what uses them.

Children get the secrets inside the config, through a pipe. Ray's replicas never do: their arguments
are kept in Ray's store and cross its network, so each secret is put into a private file of this
machine; on several machines the operator puts it there. A restarted process gets the same secrets.
All routers of a cluster share one seed key, so that an id gives the same seed at each.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from core.config import BatonConfig, check_key
from core.errors import ConfigError
from core.secret_references import is_reference, read_reference

KEY_BYTES = 32


def secrets_of(config: BatonConfig) -> dict[str, str]:
    """Return every secret setting by name, as written in the config."""
    return {
        "security.cluster_key": config.security.cluster_key,
        "seed_key": config.seed_key,
        "redis.url": config.redis.url,
    }


def with_secrets(config: BatonConfig, found: dict[str, str]) -> BatonConfig:
    """Return the config with these secrets."""
    security = {"cluster_key": found["security.cluster_key"]}
    return config.model_copy(
        update={
            "security": config.security.model_copy(update=security),
            "seed_key": found["seed_key"],
            "redis": config.redis.model_copy(update={"url": found["redis.url"]}),
        }
    )


def with_cluster_keys(config: BatonConfig) -> BatonConfig:
    """Return the config with its own secrets, and with new random ones where it has none."""
    found = secrets_of(config)
    # Not Redis' address: its password comes from the server that is started.
    for name in ("security.cluster_key", "seed_key"):
        found[name] = found[name] or secrets.token_urlsafe(KEY_BYTES)
    return with_secrets(config, found)


def with_read_secrets(config: BatonConfig) -> BatonConfig:
    """Return the config with secrets read from the files and variables that it names.

    Raises:
        ConfigError: One is missing on this machine, or is no valid key.
    """
    found = {name: read_reference(name, value) for name, value in secrets_of(config).items()}
    try:
        check_key("security.cluster_key", found["security.cluster_key"])
        check_key("seed_key", found["seed_key"])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return with_secrets(config, found)


def with_secrets_in_files(config: BatonConfig, folder: Path) -> BatonConfig:
    """Put every secret into a file of this user alone; return the config with the files' names.

    Args:
        config: Holds secrets, references to secrets, or both.
        folder: A private folder of this machine; a file for each secret is left in it.
    """
    found = secrets_of(config)
    for name, value in found.items():
        if value and not is_reference(value):
            file = folder / name
            # Made empty with its mode first: written first, it would be readable for a moment.
            file.touch(mode=0o600)
            file.write_text(value)
            found[name] = f"file:{file}"
    return with_secrets(config, found)
