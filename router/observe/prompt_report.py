"""What the cluster holds of a prompt, and where it would go now.

Owns the tree that `baton prefix explain` shows. Does not know how a prompt's tokens are made, nor
who may ask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from core.config import PlacementConfig
from core.errors import NoWorker
from core.ports import Clock
from core.types import GenerateRequest
from router.cost import Candidate
from router.observe.explanations import why_of
from router.placement import PlacementConstraints, choose
from router.prompt_prefixes import PromptNames, PromptPrefixes

MAX_WORKERS = 64
"""Workers that are shown, those that hold most of the prompt."""
MAX_NAMES = 1_024
"""Names of blocks that are shown, of each size; a long prompt has thousands."""


class PromptReport:
    """Explains prompts before they are sent."""

    def __init__(
        self,
        prefixes: PromptPrefixes,
        read_candidates: Callable[[], Sequence[Candidate]],
        rules: PlacementConfig,
        clock: Clock,
    ) -> None:
        """Ask what placement asks."""
        self._prefixes = prefixes
        self._read_candidates = read_candidates
        self._rules = rules
        self._clock = clock

    async def of(self, request: GenerateRequest) -> dict[str, Any]:
        """Explain one prompt, in the scope of its request."""
        candidates = self._read_candidates()
        names = await self._prefixes.name_blocks(request, (c.descriptor for c in candidates))
        return {
            "prompt_tokens": len(request.token_ids),
            "tenant": request.tenant,
            "blocks": [
                {
                    "block_size_tokens": size,
                    "num_blocks": len(hashes),
                    "names": [block_hash.hex() for block_hash in hashes[:MAX_NAMES]],
                }
                for (_, size), hashes in names.items()
            ],
            "workers": await self._holders(names, candidates),
            **self._placement(request, names),
        }

    async def _holders(
        self, names: PromptNames, candidates: Sequence[Candidate]
    ) -> list[dict[str, Any]]:
        held = self._prefixes.held(names)
        published = self._prefixes.published(names)
        by_id = {c.worker_id: c for c in candidates}
        most = sorted(held.keys() & by_id.keys(), key=lambda worker: (-held[worker], worker))
        rows = []
        for worker in most[:MAX_WORKERS]:
            c = by_id[worker]
            num_published = published.get(worker, 0)
            hashes = names[c.content_digest, c.block_size_tokens][:num_published]
            tiers = self._prefixes.count_by_tier(worker, hashes)
            rows.append(
                {
                    "worker": worker,
                    "role": c.descriptor.role.value,
                    "leading_blocks": num_published,
                    "leading_tokens": num_published * c.block_size_tokens,
                    "tiers": {tier.name.lower(): count for tier, count in tiers.items()},
                    # By a prompt that was sent there, and that it has not published yet.
                    "expected_blocks": held[worker] - num_published,
                }
            )
            # A long prompt has thousands of blocks: other requests have their turn.
            await asyncio.sleep(0)
        return rows

    def _placement(self, request: GenerateRequest, names: PromptNames) -> dict[str, Any]:
        try:
            placement = choose(
                self._read_candidates(),
                request,
                PlacementConstraints(self._rules),
                self._prefixes.held(names),
                self._clock.now_s(),
            )
        except NoWorker as error:
            return {"error": error.message}
        return why_of(placement)
