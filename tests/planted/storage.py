"""Bugs of the storage tiers below the pool: blocks that are stale, foreign, flipped, reordered."""

from planted.bug import Bug

RULES = "tests/simulation/test_storage_rules.py::"
TIERS = "tests/unit/engine/scheduling/test_storage_tiers.py::"
BOOK = "tests/unit/engine/scheduling/test_tier_book.py::"
DISK = "tests/unit/kv_storage/test_disk.py::"
STORE = "tests/contract/test_block_store.py::"

BUGS = [
    Bug(
        "a block that was given away during its copy is kept under its old name",
        "engine/scheduling/storage_tiers.py",
        "        return self._pool.identity(writing.block_id) == writing.identity\n",
        "        return writing.identity > 0\n",
        TIERS + "test_a_block_that_was_given_away_during_its_copy_is_not_kept",
    ),
    Bug(
        "a record is written before the pool was asked, and the next life trusts it",
        "kv_storage/disk.py",
        "            if not is_still(copy):\n",
        "            if copy.slot < 0:\n",
        DISK + "test_a_block_that_was_given_away_meanwhile_is_not_found_by_the_next_worker",
    ),
    Bug(
        "a load goes on into a pool that lost its memory",
        "engine/scheduling/storage_tiers.py",
        "        if loading.num_drops != self._pool.num_drops:\n",
        "        if loading.num_drops < 0:\n",
        TIERS + "test_a_pool_that_lost_its_memory_takes_nothing_of_a_load",
    ),
    Bug(
        "blocks behind a failed copy count as read",
        "engine/scheduling/storage_tiers.py",
        "        self._register(loading, num_read)\n",
        "        self._register(loading, len(faults))\n",
        RULES + "test_a_damaged_block_is_computed_and_counted",
    ),
    Bug(
        "a block is known by its name alone",
        "core/stored_block.py",
        "        return self.parent == other.parent and self.tokens == other.tokens\n",
        "        return self.name == other.name\n",
        BOOK + "test_other_content_under_the_same_digest_is_not_found",
    ),
    Bug(
        "equal tokens after another beginning are the same block",
        "core/stored_block.py",
        "        return self.parent == other.parent and self.tokens == other.tokens\n",
        "        return self.tokens == other.tokens\n",
        STORE + "test_equal_tokens_after_another_beginning_are_another_block",
    ),
    Bug(
        "scopes share stored blocks",
        "engine/scheduling/block_origins.py",
        "            scope = sequence.request.scope\n",
        '            scope = ""\n',
        RULES + "test_scopes_share_nothing_in_the_tiers",
    ),
    Bug(
        "heads of prompts leave before their tails",
        "engine/scheduling/tier_book.py",
        "(rank, -entry.block.depth, self._turn, entry)",
        "(rank, entry.block.depth, self._turn, entry)",
        BOOK + "test_of_one_prompt_the_tail_leaves_before_the_head",
    ),
    Bug(
        "a slot is given away while it is read",
        "engine/scheduling/tier_book.py",
        "            if entry.num_readers:\n",
        "            if entry.num_readers < 0:\n",
        BOOK + "test_a_slot_is_kept_while_somebody_copies_out_of_it",
    ),
    Bug(
        "pinned blocks know no quota",
        "engine/scheduling/tier_book.py",
        "self.num_pinned < self._max_pinned:",
        "self.num_pinned >= 0:",
        BOOK + "test_what_many_use_is_pinned_within_the_quota",
    ),
    Bug(
        "loads take the whole pool",
        "engine/scheduling/storage_tiers.py",
        "        room = self._pool.num_blocks // LOADING_SHARE - self._num_loading\n",
        "        room = self._pool.num_blocks\n",
        TIERS + "test_a_load_takes_no_more_than_half_of_the_pool",
    ),
    Bug(
        "a prompt waits for its blocks however long they take",
        "worker/stored_prefixes.py",
        "        late.start(max(wait_s, MIN_LOAD_WAIT_S))\n",
        "        late.start(wait_s + 3600.0)\n",
        RULES + "test_a_load_that_takes_longer_than_computing_is_not_waited_for",
    ),
    Bug(
        "a block on disk is not summed up",
        "kv_storage/disk.py",
        "            if is_ != should_be:\n",
        "            if is_ < 0 < should_be:\n",
        DISK + "test_each_flipped_byte_of_a_slot_is_noticed",
    ),
    Bug(
        "the checksum of a block does not know its layers' places",
        "kv_storage/block_bytes.py",
        "        bound = bind(tallies, 0, owner, layers, shards).reshape(",
        "        bound = bind(tallies, 0, owner, 0 * layers, 0 * shards).reshape(",
        DISK + "test_layers_of_a_block_that_changed_places_are_noticed",
    ),
    Bug(
        "files of another cluster are opened",
        "kv_storage/segment_file.py",
        "            elif found != head:\n",
        "            elif not found:\n",
        DISK + "test_a_file_moved_here_from_another_cluster_is_foreign",
    ),
    Bug(
        "two workers write to one folder",
        "kv_storage/disk.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n            except Blocking",
        "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)\n            except Blocking",
        DISK + "test_two_workers_have_a_folder_each_and_the_next_takes_over_the_first",
    ),
    Bug(
        "a full disk is tried again with every block",
        "kv_storage/disk.py",
        "        self._paused_until = self._now_s() + PAUSE_S\n",
        "        self._paused_until = self._now_s() - PAUSE_S\n",
        DISK + "test_a_full_disk_is_left_alone_for_a_while",
    ),
    Bug(
        "a cut payload counts as whole",
        "kv_storage/segment_file.py",
        "        if len(record) < self._record_bytes or num_bytes < self._payload_bytes:\n",
        "        if len(record) < self._record_bytes:\n",
        DISK + "test_a_truncated_file_has_what_is_left_of_it",
    ),
    Bug(
        "a change of one storage tier is published as the pool's",
        "prefix_index/publisher.py",
        "                await self._append(PrefixChange(stored, evicted, tier))\n",
        "                await self._append(PrefixChange(stored, evicted))\n",
        "tests/simulation/test_tier_publishing.py::test_each_storage_tier_is_published_by_itself",
    ),
    Bug(
        "each block that is found at the start is searched for among all free slots",
        "engine/scheduling/tier_book.py",
        "            taken.add(slot)\n",
        "            taken.add(slot)\n            self._free.remove(slot)\n",
        BOOK + "test_a_full_disk_is_entered_without_a_search_for_each_slot",
    ),
    Bug(
        "each eviction steps over all pinned blocks",
        "engine/scheduling/tier_book.py",
        "            self.drop(entry)\n        for ranked in passed_over:\n",
        "            self.drop(entry)\n"
        "        pinned = [entry for entry in self._entries.values() if entry.is_pinned]\n"
        "        passed_over += [(entry.rank, 0, entry.turn, entry) for entry in pinned]\n"
        "        for ranked in passed_over:\n",
        BOOK + "test_pinned_blocks_are_not_looked_at_again_when_others_leave",
    ),
    Bug(
        "kept blocks are evicted without having been written",
        "engine/scheduling/block_pool.py",
        "        return block_ids + self._kept.first(num_blocks - len(block_ids))\n",
        "        return block_ids\n",
        TIERS + "test_blocks_that_the_pool_keeps_are_written_last_but_written",
    ),
    Bug(
        "a file that was left half made keeps its slots for ever",
        "kv_storage/segment_file.py",
        "            if not any(found):\n",
        "            if not os.fstat(self._fd).st_size:\n",
        DISK + "test_a_file_that_was_left_half_made_is_made_anew",
    ),
    Bug(
        "a load goes on that nobody waits for any more, and holds half of the pool",
        "worker/stored_prefixes.py",
        "                if late.is_over:\n",
        "                if faults[-1:] == [StorageFault.UNREACHABLE]:\n",
        RULES + "test_a_load_that_takes_longer_than_computing_is_not_waited_for",
    ),
    Bug(
        "segments of a model that is gone stay for ever",
        "kv_storage/disk.py",
        "                    for path in segments:\n                        path.unlink()\n",
        "                    pass\n",
        DISK + "test_what_nobody_has_used_for_a_week_is_removed",
    ),
    Bug(
        "segments that another worker uses are removed",
        "kv_storage/disk.py",
        "                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n                segments",
        "                segments",
        DISK + "test_what_nobody_has_used_for_a_week_is_removed",
    ),
    Bug(
        "a disk that hangs keeps its worker from ending",
        "kv_storage/disk.py",
        "            threads.shutdown(wait=False)\n",
        "            threads.shutdown()\n",
        DISK + "test_a_disk_that_hangs_keeps_no_worker_from_ending",
    ),
]
