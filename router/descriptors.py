"""How many descriptors a router's process has, and how they are shared out.

Owns the limit and its shares. Does not know connections.
"""

import contextlib
import resource

from core import events

MAX_GRPC_CONNECTIONS = 4096
INSIDE_DESCRIPTORS = 256
"""For workers' sessions, tokenizers, the gRPC server and files."""


def raise_descriptor_limit(needed: int) -> int:
    """Raise the soft limit of descriptors to the hard one; log if that is too low.

    Args:
        needed: Descriptors for all that the config allows at once.

    Returns:
        The limit now in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = needed if soft == resource.RLIM_INFINITY else soft
    if limit < needed:
        events.DESCRIPTORS_SCARCE.log(limit=limit, needed=needed)
    return limit


def grpc_share(num_descriptors: int) -> int:
    """Return how many connections the gRPC server may have: at most a fourth of the descriptors."""
    return max(1, min(MAX_GRPC_CONNECTIONS, num_descriptors // 4))
