"""The secrets that the processes of one cluster share and nobody else knows.

Owns how they are made when the config names none: the cluster's key, and the key from which the
routers make seeds. Does not know what they key. Called by `cluster.local` and `cluster.ray_app`
before they start a process; the secrets then travel inside the config, as the address of Redis does:
through a pipe to children, in the arguments of replicas on Ray. A process that is started again gets
the same ones, and all routers of a cluster have one seed key: an id means one seed at each of them.
"""

from __future__ import annotations

import secrets

from core.config import BatonConfig

KEY_BYTES = 32


def with_cluster_keys(config: BatonConfig) -> BatonConfig:
    """Return the config with its own secrets, and with new random ones where it has none."""
    if not config.security.cluster_key:
        drawn = {"cluster_key": secrets.token_urlsafe(KEY_BYTES)}
        security = config.security.model_copy(update=drawn)
        config = config.model_copy(update={"security": security})
    if not config.seed_key:
        config = config.model_copy(update={"seed_key": secrets.token_urlsafe(KEY_BYTES)})
    return config
