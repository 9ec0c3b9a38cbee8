"""The secret that the workers of one cluster share and nobody else knows.

Owns how it is made when the config names none. Does not know what it keys. Called by
`cluster.local` and `cluster.ray_app` before they start a worker; the key then travels inside the
config, as the address of Redis does: through a pipe to children, in the arguments of replicas on
Ray. A worker that is started again gets the same one.
"""

from __future__ import annotations

import secrets

from core.config import BatonConfig

KEY_BYTES = 32


def with_cluster_key(config: BatonConfig) -> BatonConfig:
    """Return the config with its own cluster key, or with a new random one."""
    if config.security.cluster_key:
        return config
    security = config.security.model_copy(update={"cluster_key": secrets.token_urlsafe(KEY_BYTES)})
    return config.model_copy(update={"security": security})
