"""The storage tiers below one pool: what is written to them, and what is loaded back for whom.

Owns both decisions and their effect on the books: pool, tiers, counts. Does not know bytes, threads
or files, and leaves the order in which a tier's blocks leave to `TierBook`.

    pool, blocks that leave next ──pick_writes──▶ copied ──end_write──▶ in the tiers
    waiting prompt ──begin_load──▶ blocks taken, copied ──end_load──▶ cached blocks of the pool
    preempted sequence ──begin_swap_in──▶ its own blocks, copied ──end_load──▶ it goes on

Blocks are written while they are still cached, shortly before the pool would evict them, or while
the sequence runs that would be preempted next: evicting and preempting stay assignments, and nobody
waits for a copy. A block that was given to somebody meanwhile has another identity by then, or
none, and what was copied is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
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
"""Blocks next in line to leave the pool that are looked at. A prompt takes all its blocks at
once: a longer one may evict some that were not written."""
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
    """Blocks before them that the pool has; none if the sequence holds them itself."""
    block_ids: list[int]
    sources: list[tuple[StorageTier, Entry]]
    """Where each comes from."""
    num_drops: int
    """Of the pool's cache, before."""
    compute_s: float
    """What it would take to compute them; 0: not known."""
    is_swap_in: bool = False
    """The sequence was preempted, and the blocks are in its table."""
    is_late: bool = False
    """The sequence went on without waiting for the end."""
    num_read: int | None = None
    """Blocks that are there now; None: the load is under way."""


@dataclass(slots=True)
class TierCounts:
    """What the tiers have done so far."""

    hit_blocks: Counter[StorageTier] = field(default_factory=Counter)
    swapped_in_blocks: Counter[StorageTier] = field(default_factory=Counter)
    """Of the hits, those for preempted sequences."""
    written_blocks: Counter[StorageTier] = field(default_factory=Counter)
    faults: Counter[tuple[StorageTier, StorageFault]] = field(default_factory=Counter)
    num_computed_instead: int = 0
    """Sequences whose blocks lay here, and were cheaper to compute."""
    num_late: int = 0
    """Sequences that did not wait for their blocks to the end."""


class StorageTiers:
    """Tiers of one pool, the fastest first."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        origins: BlockOrigins,
        tiers: Mapping[StorageTier, Tier],
        preempted_next: Callable[[int], list[int]] = lambda num_blocks: [],
    ) -> None:
        """Start empty.

        Args:
            pool: Above the tiers.
            tables: Over the same pool.
            origins: Notes on its blocks.
            tiers: The books of each.
            preempted_next: As in `BlockSupply`; no sequence is swapped out unless given.
        """
        self.counts = TierCounts()
        self.tiers = dict(sorted(tiers.items()))
        self._pool = pool
        self._tables = tables
        self._origins = origins
        self._preempted_next = preempted_next
        self._num_loading = 0
        self._ahead = min(AHEAD_BLOCKS, pool.num_blocks)

    # --- out of the pool ----------------------------------------------------------------------

    def pick_writes(self, max_blocks: int) -> list[Writing]:
        """Choose blocks that leave soon and are worth keeping; each has its slot already."""
        picked: list[Writing] = []
        # With as many free blocks as that, nothing is evicted soon.
        if self._pool.num_free >= min(AHEAD_BLOCKS, self._pool.num_blocks // 2):
            return picked
        leaving = self._pool.evicted_next(self._ahead)
        # Sequences are preempted when nothing is free or cached any more.
        if self._pool.num_available < self._ahead:
            leaving += self._preempted_next(self._ahead - self._pool.num_available)
        for block_id in self._origins.undecided(leaving):
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
        num_unused = sum(self._pool.references(block_id) == 0 for block_id in hits)
        del sources[min(self._room, self._pool.num_available - num_unused) :]
        compute_s = len(sources) * sequence.block_size_tokens * token_s
        if not self._pays(sources, compute_s):
            return None
        # Held, so that what comes before the loaded blocks is there as long as they are.
        for block_id in hits:
            self._pool.share(block_id)
        block_ids = self._pool.allocate(len(sources))
        self._hold(sources)
        return Loading(sequence, hits, block_ids, sources, self._pool.num_drops, compute_s)

    @property
    def _room(self) -> int:
        """Blocks that further loads may take: a store that hangs keeps them for ever."""
        return self._pool.num_blocks // LOADING_SHARE - self._num_loading

    def _pays(self, sources: list[tuple[StorageTier, Entry]], compute_s: float) -> bool:
        """True if loading is predicted to be quicker than computing, or nothing is predicted."""
        if not sources:
            return False
        if compute_s and self._load_s(sources) >= compute_s:
            self.counts.num_computed_instead += 1
            return False
        return True

    def _hold(self, sources: list[tuple[StorageTier, Entry]]) -> None:
        self._num_loading += len(sources)
        for tier, entry in sources:
            self.tiers[tier].book.hold(entry)

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

        Blocks of a sequence that swaps in are registered when it goes on (`Swapping.end`).

        Args:
            loading: Under way until now.
            faults: Of the leading blocks; the copies behind them were not tried.

        Returns:
            Blocks that are there now.
        """
        num_read = 0
        while num_read < len(faults) and faults[num_read] is None:
            num_read += 1
        if num_read < len(faults) and (fault := faults[num_read]) is not None:
            self._fail(*loading.sources[num_read], fault)
        # The pool's memory was lost meanwhile: what was read lies in none, or in another's.
        if loading.num_drops != self._pool.num_drops:
            num_read = 0
        # What comes before the blocks may have left with their sequence.
        if loading.is_swap_in and (loading.is_late or loading.sequence.is_finished):
            num_read = 0
        self._register(loading, num_read)
        self._pool.free([*loading.hits, *loading.block_ids])
        self._num_loading -= len(loading.block_ids)
        for tier, entry in loading.sources:
            self.tiers[tier].book.release(entry)
        loading.num_read = num_read
        return num_read

    def _register(self, loading: Loading, num_read: int) -> None:
        sequence = loading.sequence
        if not num_read:
            return
        # Another sequence may have computed the same meanwhile: then a copy is nobody's.
        if not loading.is_swap_in:
            self._tables.register_loaded(sequence, loading.hits, loading.block_ids[:num_read])
        weight = self._origins.weight_of(sequence)
        for tier, one in self.tiers.items():
            read = [entry for source, entry in loading.sources[:num_read] if source is tier]
            self.counts.hit_blocks[tier] += len(read)
            # The sequence that swaps them in has had them already.
            if loading.is_swap_in:
                self.counts.swapped_in_blocks[tier] += len(read)
            else:
                one.book.use(read, weight)

    def _fail(self, tier: StorageTier, entry: Entry, fault: StorageFault) -> None:
        self.counts.faults[tier, fault] += 1
        self.tiers[tier].book.drop(entry)

    # --- preempted sequences ------------------------------------------------------------------

    def swap_out(self, sequence: Sequence) -> None:
        """Pin in the tiers what a sequence has computed, which it loses now.

        `begin_swap_in` or `forget` follows. A hand-over is computed again, and so is a sequence
        that must run alone: others would start while it loads.
        """
        if (
            sequence.handover is not None
            or sequence.run_alone
            or not self._tables.may_hit(sequence)
        ):
            return
        num_full = sequence.num_computed_tokens // sequence.block_size_tokens
        sequence.num_swapped_blocks = num_full
        for tier in self.tiers.values():
            tier.book.swap_out(self._origins.chain(sequence, num_full)[1 : num_full + 1])

    def forget(self, sequence: Sequence) -> None:
        """A sequence goes on or ends: its blocks are pinned no more. Idempotent."""
        num_full, sequence.num_swapped_blocks = sequence.num_swapped_blocks, 0
        for tier in self.tiers.values() if num_full else ():
            tier.book.swapped_in(self._origins.chain(sequence, num_full)[1 : num_full + 1])

    def begin_swap_in(self, sequence: Sequence, num_hits: int, token_s: float) -> Loading | None:
        """Load what a preempted sequence lacks into blocks that it has just been given.

        Args:
            sequence: Has its whole table; it must not compute before `end_load`.
            num_hits: Leading blocks of the table whose content was still in the pool.
            token_s: As in `begin_load`.

        Returns:
            None if the tiers have nothing of it, or computing is cheaper.
        """
        self.forget(sequence)
        sources = self._find(sequence, num_hits)[: self._room]
        compute_s = len(sources) * sequence.block_size_tokens * token_s
        if not self._pays(sources, compute_s):
            return None
        block_ids = sequence.block_table[num_hits : num_hits + len(sources)]
        # References of the load's own: the sequence may be cancelled while it is copied to.
        for block_id in block_ids:
            self._pool.share(block_id)
        self._hold(sources)
        num_drops = self._pool.num_drops
        return Loading(sequence, [], block_ids, sources, num_drops, compute_s, is_swap_in=True)

    @property
    def num_awaited(self) -> int:
        """Blocks that preempted sequences go on with; zero at rest."""
        return sum(tier.book.num_awaited for tier in self.tiers.values())

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
