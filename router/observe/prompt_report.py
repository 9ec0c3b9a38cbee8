"""What the cluster holds of a prompt, and where it would go now.

Owns the tree that `baton prefix explain` shows. Does not know how a prompt's tokens are made, nor
who may ask.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from core.config import PlacementConfig
from core.errors import NoWorker
from core.types import GenerateRequest
from router.candidate import Candidate
from router.observe.why import why_of
from router.placement import PlacementConstraints
from router.placer import Placer
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
        placer: Placer,
        read_candidates: Callable[[], Sequence[Candidate]],
        rules: PlacementConfig,
    ) -> None:
        """Ask what placement asks."""
        self._prefixes = prefixes
        self._placer = placer
        self._read_candidates = read_candidates
        self._rules = rules

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
        by_id = {c.worker_id: c for c in candidates}
        most = sorted(held.keys() & by_id.keys(), key=lambda worker: (-held[worker], worker))
        rows = []
        for worker in most[:MAX_WORKERS]:
            c = by_id[worker]
            hashes = names[c.content_digest, c.block_size_tokens]
            tiers = self._prefixes.leading_tiers(worker, hashes)
            num_published = len(tiers)
            rows.append(
                {
                    "worker": worker,
                    "role": c.descriptor.role.value,
                    "leading_blocks": num_published,
                    "leading_tokens": num_published * c.block_size_tokens,
                    "storage": dict(Counter(tier.label for tier in tiers)),
                    # By a prompt that was sent there, and that it has not published yet.
                    "expected_blocks": held[worker] - num_published,
                }
            )
            # A long prompt has thousands of blocks: other requests have their turn.
            await asyncio.sleep(0)
        return rows

    def _placement(self, request: GenerateRequest, names: PromptNames) -> dict[str, Any]:
        constraints = PlacementConstraints(self._rules)
        has_scores = request.sampling.prompt_logprobs is not None
        try:
            placement = self._placer.place(request, names, constraints, may_fetch=not has_scores)
        except NoWorker as error:
            return {"error": error.message}
        return why_of(placement)
