"""One live worker, as placement compares it.

Owns what a router knows of a worker at one instant, and what follows from it for every request.
Does not know requests, nor where its figures come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.ids import WorkerId
from core.session import Load, Role, WorkerDescriptor

RECENT_S = 60.0
"""Work this old counts 1/e of what is new."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One live worker as the router sees it.

    `pending_tokens` are those of prompts that this router has sent and the worker has not answered,
    without what the worker was thought to hold; `pending_requests` are those that this router has
    there.
    """

    descriptor: WorkerDescriptor
    load: Load
    pending_tokens: int = 0
    pending_requests: int = 0
    reported_tokens: int = 0
    """Of the pending tokens, those that the worker's last report counts already."""
    reported_requests: int = 0
    """Requests that this router had there when the worker reported."""
    head_tokens: int = 0
    """Of the pending tokens, those of the prompt that was sent first: it is computed now."""
    head_started_s: float = 0.0
    """When that one's turn came (seconds, on the router's clock)."""
    answered_requests: int = 0
    """Of the pending requests, those to which the worker has answered: what decodes is among
    them."""
    prefill_tokens_per_s: float = 0.0
    """As measured; 0: not yet."""
    exposed_transfer_s: float = 0.0
    """By which its transfers were late, as measured, whoever received."""
    exposed_by_receiver: Mapping[WorkerId, float] = field(default_factory=dict)
    """The same for each receiver that is known."""
    recent_work: float = 0.0
    """Logarithm of the tokens computed here of late, were it now the clock's zero."""
    worker_id: WorkerId = field(init=False)
    model: str = field(init=False)
    content_digest: str = field(init=False)
    block_size_tokens: int = field(init=False)
    is_prefill: bool = field(init=False)
    queued_tokens: int = field(init=False)
    """Tokens to compute before a prompt that comes now, had the first one only begun."""
    num_running: int = field(init=False)
    num_decoding: int = field(init=False)
    """Of the running ones, those that a prompt would delay if it were computed there now. A request
    whose prompt is still computed elsewhere is none of them."""
    num_available: int = field(init=False)
    """Blocks that a request could get."""
    used_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        """Work out once what every placement reads: of each worker few words are touched then."""
        load = self.load
        descriptor = self.descriptor
        for name in ("worker_id", "model", "content_digest", "block_size_tokens"):
            object.__setattr__(self, name, getattr(descriptor, name))
        object.__setattr__(self, "is_prefill", descriptor.role is Role.PREFILL)
        tokens_of_others = max(0, load.waiting_tokens - self.reported_tokens)
        object.__setattr__(self, "queued_tokens", self.pending_tokens + tokens_of_others)
        # A report is up to half a second old: what this router has sent there since counts at
        # once, and what has ended no more. The next turn of a chat often comes before a report.
        num_reported = load.num_running + load.num_waiting
        num_of_others = max(0, num_reported - self.reported_requests)
        num_running = num_of_others + self.pending_requests
        object.__setattr__(self, "num_running", num_running)
        object.__setattr__(self, "num_decoding", num_of_others + self.answered_requests)
        num_available = load.free_blocks + load.cached_blocks
        object.__setattr__(self, "num_available", num_available)
        object.__setattr__(self, "used_blocks", descriptor.num_blocks - num_available)
