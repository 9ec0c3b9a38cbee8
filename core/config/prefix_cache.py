"""Where a worker keeps blocks of KV that its pool has no room for.

Owns these settings. Does not know files.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from core.config.node import Node


class PrefixCacheConfig(Node):
    """Storage tiers below the KV pool of each worker; a prompt's beginning is loaded from there."""

    host_bytes: int = Field(
        0, ge=0, description="host memory of each worker for blocks that its pool evicts; 0: none"
    )
    disk_bytes: int = Field(
        0,
        ge=0,
        description="disk space of each worker for such blocks; a worker that starts again finds "
        "them; 0: none",
    )
    disk_folder: str = Field(
        "",
        description="folder on a local disk for them; KV is stored as it is, and tells who can "
        "read it what prompts were",
    )
    disk_min_uses: int = Field(
        1, ge=1, le=1000, description="requests that must have had a block before it goes to disk"
    )
    pin_uses: int = Field(
        16,
        ge=0,
        description="blocks that so many requests had (system prompts) are pinned; 0: none",
    )
    pinned_share: float = Field(
        0.1, ge=0, le=0.9, description="quota of pinned blocks in each storage tier"
    )

    @model_validator(mode="after")
    def _disk_has_a_folder(self) -> PrefixCacheConfig:
        if self.disk_bytes and not self.disk_folder:
            raise ValueError("disk_bytes is set and disk_folder is empty; name a folder")
        return self
