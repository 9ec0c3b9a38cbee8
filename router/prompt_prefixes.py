"""What the workers hold of a prompt, as far as this router knows.

Owns the names of a prompt's blocks, made in slices so that no other request waits for a long one,
and the question to the view and to the prompts on their way. Does not know how the view is fed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from core.block_hash import BlockHash, naming_of
from core.ids import RunId, WorkerId
from core.ports import Clock
from core.prefix_changes import StorageTier
from core.session import WorkerDescriptor
from core.types import GenerateRequest
from router.expected_prefixes import ExpectedPrefixes
from router.prefix_outcome import Expectation, PromptOutcome

SLICE_TOKENS = 4_096
"""Tokens that are hashed in one go: about 0.4 ms, after which others have their turn."""

PromptNames = Mapping[tuple[str, int], Sequence[BlockHash]]
"""Names of a prompt's full blocks, by a worker's content digest and block size."""


class PublishedBlocks(Protocol):
    """Which worker has published which blocks: the view of the index."""

    @property
    def is_empty(self) -> bool:
        """True if no worker has published anything."""
        ...

    @property
    def has_stored(self) -> bool:
        """True if anybody has published blocks below its pool."""
        ...

    def match(
        self, block_hashes: Sequence[BlockHash], tier: StorageTier | None = None
    ) -> dict[WorkerId, int]:
        """Count the leading blocks that each worker has published, in one tier or in any."""
        ...

    def leading_tiers(
        self, worker: WorkerId, block_hashes: Sequence[BlockHash]
    ) -> list[StorageTier]:
        """Return the fastest storage tier of each leading block that a worker has published."""
        ...


class PromptPrefixes:
    """The router's knowledge of prefixes; without a view there is none, and nothing is hashed."""

    def __init__(self, view: PublishedBlocks | None, hash_key: bytes, clock: Clock) -> None:
        """Ask `view`; `hash_key` is that of the workers."""
        self._view = view
        self._hash_key = hash_key
        self._clock = clock
        self._expected = ExpectedPrefixes()

    async def names(
        self, request: GenerateRequest, descriptors: Iterable[WorkerDescriptor]
    ) -> PromptNames:
        """Name the blocks of a prompt as each of the workers would, but for its last token's."""
        if self._view is None or self._view.is_empty:
            return {}
        return await self.name_blocks(request, descriptors)

    async def name_blocks(
        self, request: GenerateRequest, descriptors: Iterable[WorkerDescriptor]
    ) -> PromptNames:
        """Name them also while nobody is known to hold any block."""
        kinds = dict.fromkeys((d.content_digest, d.block_size_tokens) for d in descriptors)
        return {kind: await self._hash(request, *kind) for kind in kinds}

    async def _hash(
        self, request: GenerateRequest, digest: str, block_size_tokens: int
    ) -> list[BlockHash]:
        # A worker computes the last token always, for its logits.
        num_tokens = len(request.token_ids) - 1
        naming = naming_of(digest, request.scope, block_size_tokens, self._hash_key)
        hashes: list[BlockHash] = []
        slice_tokens = max(1, SLICE_TOKENS // block_size_tokens) * block_size_tokens
        for start in range(0, num_tokens, slice_tokens):
            if start:
                await asyncio.sleep(0)
            end = min(start + slice_tokens, num_tokens)
            naming.extend(hashes, request.token_ids[start:end], block_size_tokens)
        return hashes

    def held(
        self, names: PromptNames, published: Mapping[WorkerId, int] | None = None
    ) -> dict[WorkerId, int]:
        """Count the leading blocks of a prompt that each worker holds, or will hold in a moment.

        Args:
            names: Of the prompt's blocks.
            published: The answer of `published`, if it was asked just now.
        """
        held = dict(self.published(names) if published is None else published)
        if self._view is None or self._view.is_empty:
            return held
        now_s = self._clock.now_s()
        for hashes in names.values():
            for worker, num_blocks in self._expected.match(hashes, now_s).items():
                held[worker] = max(held.get(worker, 0), num_blocks)
        return held

    def published(self, names: PromptNames) -> dict[WorkerId, int]:
        """Count the leading blocks that each worker has published."""
        found: dict[WorkerId, int] = {}
        if self._view is not None:
            for hashes in names.values():
                found |= self._view.match(hashes)
        return found

    def in_pools(
        self, names: PromptNames, published: Mapping[WorkerId, int]
    ) -> Mapping[WorkerId, int]:
        """Count those of the published ones that lie in pools: only from there do peers read."""
        if self._view is None or not self._view.has_stored:
            return published
        found: dict[WorkerId, int] = {}
        for hashes in names.values():
            found |= self._view.match(hashes, StorageTier.POOL)
        return found

    def leading_tiers(
        self, worker: WorkerId, block_hashes: Sequence[BlockHash]
    ) -> list[StorageTier]:
        """Return the fastest storage tier of each leading block that a worker has published."""
        return [] if self._view is None else self._view.leading_tiers(worker, block_hashes)

    def expectation(
        self,
        request: GenerateRequest,
        worker: WorkerDescriptor,
        names: PromptNames,
        num_elsewhere: int,
    ) -> Expectation | None:
        """Return what is thought to be found of a prompt at the worker that it is placed on.

        None if nobody can tell: no names were made, or the prompt is computed whole for its scores.

        Args:
            request: The prompt.
            worker: Which computes it.
            names: Of its blocks.
            num_elsewhere: Leading blocks that the best of all workers holds.
        """
        hashes = names.get((worker.content_digest, worker.block_size_tokens))
        if hashes is None or request.sampling.prompt_logprobs is not None:
            return None
        tiers = self.leading_tiers(worker.worker_id, hashes)
        coming = self._expected.match(hashes, self._clock.now_s()).get(worker.worker_id, 0)
        return Expectation(
            worker=worker.worker_id,
            block_hashes=hashes,
            block_size_tokens=worker.block_size_tokens,
            num_tokens=len(request.token_ids),
            tiers=tiers,
            num_expected=max(len(tiers), coming),
            num_elsewhere=num_elsewhere,
        )

    def outcome(self, expectation: Expectation, num_found_tokens: int) -> PromptOutcome:
        """Compare it with what the worker has found."""

        def count_published() -> int:
            return len(self.leading_tiers(expectation.worker, expectation.block_hashes))

        return expectation.outcome(num_found_tokens, count_published)

    def sent(self, run_id: RunId, worker: WorkerDescriptor, names: PromptNames) -> None:
        """A prompt goes to a worker: those like it find it there from now on."""
        hashes = names.get((worker.content_digest, worker.block_size_tokens))
        if hashes:
            self._expected.add(run_id, worker.worker_id, hashes)

    def answered(self, run_id: RunId) -> None:
        """The worker has computed a prompt, and will publish it itself."""
        self._expected.answered(run_id, self._clock.now_s())

    def failed(self, run_id: RunId) -> None:
        """The worker will not compute a prompt."""
        self._expected.remove(run_id)
