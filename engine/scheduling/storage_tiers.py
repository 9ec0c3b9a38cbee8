"""The storage tiers below one pool: what is written to them, and what is loaded back for whom.

Owns both decisions and their effect on the books: pool, tiers, counts. Does not know bytes, threads
or files, and leaves the order in which a tier's blocks leave to `TierBook`.

    pool, blocks that are evicted next ──pick_writes──▶ copied ──end_write──▶ in the tiers
    waiting prompt ──begin_load──▶ blocks taken, copied ──end_load──▶ cached blocks of the pool

Blocks are written while they are still cached, shortly before the pool would evict them: evicting
stays an assignment, and nobody waits for a copy. A block that was given to somebody meanwhile has
another identity by then, or none, and what was copied is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from core.block_hash import pack_tokens
from core.prefix_changes import StorageTier
from core.stored_block import StorageFault, StoredBlock
from engine.scheduling.block_origins import BlockOrigins
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_tables import BlockTables
from engine.scheduling.sequence import Sequence
from engine.scheduling.tier_book import Entry, TierBook

AHEAD_BLOCKS = 1_024
"""Blocks next in line for eviction that are looked at. A prompt takes all its blocks at once: a
longer one may evict some that were not written."""
LOADING_SHARE = 2
"""Of a pool, at most one block in so many is taken by loads under way: the rest is for those who
compute."""


@dataclass(slots=True)
class Tier:
    """One tier: its books, and when a block is worth a place in it."""

    book: TierBook
    block_s: float
    """What it takes to load a block (seconds): assumed, then measured."""
    min_uses: int = 1
    """Sequences that must have had a block."""


@dataclass(frozen=True, slots=True)
class Writing:
    """A block of the pool on its way to a tier."""

    tier: StorageTier
    entry: Entry
    block_id: int
    identity: int
    """What the block was in the pool when it was picked."""


@dataclass(slots=True, eq=False)
class Loading:
    """Blocks on their way into the pool, for one sequence; all of them are held."""

    sequence: Sequence
    hits: list[int]
    """Blocks before them that the pool has."""
    block_ids: list[int]
    sources: list[tuple[StorageTier, Entry]]
    """Where each comes from."""
    num_drops: int
    """Of the pool's cache, before."""
    compute_s: float
    """What it would take to compute them; 0: not known."""


@dataclass(slots=True)
class TierCounts:
    """What the tiers have done so far."""

    hit_blocks: Counter[StorageTier] = field(default_factory=Counter)
    written_blocks: Counter[StorageTier] = field(default_factory=Counter)
    faults: Counter[tuple[StorageTier, StorageFault]] = field(default_factory=Counter)
    num_computed_instead: int = 0
    """Prompts whose blocks lay here, and were cheaper to compute."""
    num_late: int = 0
    """Prompts that did not wait for their blocks to the end."""


class StorageTiers:
    """Tiers of one pool, the fastest first."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        origins: BlockOrigins,
        tiers: Mapping[StorageTier, Tier],
    ) -> None:
        self.counts = TierCounts()
        self.tiers = dict(sorted(tiers.items()))
        self._pool = pool
        self._tables = tables
        self._origins = origins
        self._num_loading = 0
        self._ahead = min(AHEAD_BLOCKS, pool.num_blocks)

    # --- out of the pool ----------------------------------------------------------------------

    def pick_writes(self, max_blocks: int) -> list[Writing]:
        """Choose blocks that are evicted soon and worth keeping; each has its slot already."""
        picked: list[Writing] = []
        # With as many free blocks as that, nothing is evicted soon.
        if self._pool.num_free >= min(AHEAD_BLOCKS, self._pool.num_blocks // 2):
            return picked
        for block_id in self._origins.undecided(self._pool.evicted_next(self._ahead)):
            if len(picked) >= max_blocks:
                break
            self._origins.decide(block_id)
            picked += self._writings(block_id)
        return picked

    def _writings(self, block_id: int) -> list[Writing]:
        origins = self._origins
        block = self._stored_block(block_id)
        num_uses = origins.num_uses(block_id)
        weight = origins.weight(block_id)
        writings = []
        for tier, one in self.tiers.items():
            if num_uses < one.min_uses:
                continue
            entry = one.book.admit(block, origins.num_chain_blocks(block_id), num_uses, weight)
            if entry is not None:
                writings.append(Writing(tier, entry, block_id, self._pool.identity(block_id)))
        return writings

    def _stored_block(self, block_id: int) -> StoredBlock:
        name, tokens = self._pool.content(block_id)
        return StoredBlock(
            self._origins.parent(block_id), tokens, name, self._origins.depth(block_id)
        )

    def is_still(self, writing: Writing) -> bool:
        """True if the block has been this one until now; any thread may ask.

        The pool forgets what a block was before anybody is given it to write to.
        """
        return self._pool.identity(writing.block_id) == writing.identity

    def end_write(self, writing: Writing, fault: StorageFault | None) -> None:
        """A block was copied, and can be found from now on, or it could not be."""
        book = self.tiers[writing.tier].book
        if fault is None:
            book.written(writing.entry)
            self.counts.written_blocks[writing.tier] += 1
        else:
            self.counts.faults[writing.tier, fault] += 1
            # Somebody else's file is in its place, and stays there.
            if fault is StorageFault.FOREIGN:
                book.lose(writing.entry)
            else:
                book.drop(writing.entry)

    # --- into the pool ------------------------------------------------------------------------

    def begin_load(self, sequence: Sequence, token_s: float) -> Loading | None:
        """Take blocks of the pool for what a new sequence's prompt continues with in the tiers.

        Args:
            sequence: Waits nowhere yet.
            token_s: What it takes to compute a token (seconds); 0: not known.

        Returns:
            None if there is nothing to load, no room, or computing is cheaper.
        """
        if not any(len(tier.book) for tier in self.tiers.values()):
            return None
        if not self._tables.may_hit(sequence):
            return None
        hits = self._tables.find_prefix(sequence)
        sources = self._find(sequence, len(hits))
        room = self._pool.num_blocks // LOADING_SHARE - self._num_loading
        num_unused = sum(self._pool.references(block_id) == 0 for block_id in hits)
        del sources[min(room, self._pool.num_available - num_unused) :]
        if not sources:
            return None
        compute_s = len(sources) * sequence.block_size_tokens * token_s
        if token_s and self._load_s(sources) >= compute_s:
            self.counts.num_computed_instead += 1
            return None
        # Held, so that what comes before the loaded blocks is there as long as they are.
        for block_id in hits:
            self._pool.share(block_id)
        block_ids = self._pool.allocate(len(sources))
        self._num_loading += len(sources)
        for tier, entry in sources:
            self.tiers[tier].book.hold(entry)
        return Loading(sequence, hits, block_ids, sources, self._pool.num_drops, compute_s)

    def _find(self, sequence: Sequence, first: int) -> list[tuple[StorageTier, Entry]]:
        """Find the blocks from `first` on; the last token is always left to compute."""
        sources: list[tuple[StorageTier, Entry]] = []
        last = (sequence.num_tokens - 1) // sequence.block_size_tokens
        chain = self._origins.chain(sequence, last) if first < last else []
        for index in range(first, last):
            tokens = pack_tokens(sequence.block_tokens(index))
            block = StoredBlock(chain[index], tokens, sequence.full_block_hash(index), index)
            found = self._find_block(block)
            if found is None:
                break
            sources.append(found)
        return sources

    def _find_block(self, block: StoredBlock) -> tuple[StorageTier, Entry] | None:
        for tier, one in self.tiers.items():
            entry = one.book.find(block)
            if entry is not None:
                return tier, entry
        return None

    def _load_s(self, sources: list[tuple[StorageTier, Entry]]) -> float:
        """Predict a load that begins now, behind those under way."""
        slowest = max(self.tiers[tier].block_s for tier, _ in sources)
        return sum(self.tiers[tier].block_s for tier, _ in sources) + self._num_loading * slowest

    def end_load(self, loading: Loading, faults: list[StorageFault | None]) -> int:
        """Register what was read, up to the first fault, and give all of it back to the pool.

        Args:
            loading: Under way until now.
            faults: Of the leading blocks; the copies behind them were not tried.

        Returns:
            Blocks that are cached now.
        """
        num_read = 0
        while num_read < len(faults) and faults[num_read] is None:
            num_read += 1
        if num_read < len(faults) and (fault := faults[num_read]) is not None:
            self._fail(*loading.sources[num_read], fault)
        # The pool's memory was lost meanwhile: what was read lies in none, or in another's.
        if loading.num_drops != self._pool.num_drops:
            num_read = 0
        self._register(loading, num_read)
        self._pool.free([*loading.hits, *loading.block_ids])
        self._num_loading -= len(loading.block_ids)
        for tier, entry in loading.sources:
            self.tiers[tier].book.release(entry)
        return num_read

    def _register(self, loading: Loading, num_read: int) -> None:
        sequence = loading.sequence
        if not num_read:
            return
        # Another sequence may have computed the same meanwhile: then a copy is nobody's.
        self._tables.register_loaded(sequence, loading.hits, loading.block_ids[:num_read])
        weight = self._origins.weight_of(sequence)
        for tier, one in self.tiers.items():
            read = [entry for source, entry in loading.sources[:num_read] if source is tier]
            one.book.use(read, weight)
            self.counts.hit_blocks[tier] += len(read)

    def _fail(self, tier: StorageTier, entry: Entry, fault: StorageFault) -> None:
        self.counts.faults[tier, fault] += 1
        self.tiers[tier].book.drop(entry)

    def learn(self, tier: StorageTier, num_blocks: int, took_s: float) -> None:
        """Learn from a load how long a block takes."""
        one = self.tiers[tier]
        one.block_s += (took_s / num_blocks - one.block_s) / 4

    @property
    def num_loading(self) -> int:
        """Blocks of the pool that loads hold; zero at rest."""
        return self._num_loading

    def check(self) -> None:
        """Compare the books of every tier.

        Raises:
            InvariantViolation: Some do not balance.
        """
        for tier in self.tiers.values():
            tier.book.check()
