"""Bugs of the prefix index."""

from planted.bug import Bug

RULES = "tests/simulation/test_prefix_rules.py::"
FORGERIES = "tests/simulation/test_prefix_forgeries.py::"
VIEW = "tests/unit/prefix_index/test_view.py::"
CHANGES = "tests/unit/engine/scheduling/test_block_changes.py::"

CLUSTER = "tests/simulation/test_cached_prefixes.py::"
POOL = "tests/unit/engine/scheduling/test_block_pool_rules.py::"

BUGS = [
    Bug(
        "with an unreachable block its like leaves the index",
        "engine/scheduling/block_pool.py",
        "self._changes is not None and not self._identities.is_known(block_hash)",
        "self._changes is not None",
        POOL + "test_of_two_blocks_with_one_name_the_first_that_is_evicted_is_no_news",
    ),
    Bug(
        "what a failover lost is never published again",
        "prefix_index/publisher.py",
        "self._store.append(self._life, [entry], TTL_S, self._position)",
        "self._store.append(self._life, [entry], TTL_S)",
        RULES + "test_a_batch_that_was_lost_is_noticed_by_the_one_behind_it",
    ),
    Bug(
        "a worker that has nothing to publish does not look whether its last batch is there",
        "prefix_index/publisher.py",
        "self._life, self._whole_number, TTL_S, self._position",
        "self._life, self._whole_number, TTL_S",
        RULES + "test_a_batch_that_was_lost_is_noticed_by_an_idle_worker_too",
    ),
    Bug(
        "a head that another has written stays",
        "prefix_index/publisher.py",
        "        return await self._store.read_head(self._life) == self._head\n",
        "        return True\n",
        FORGERIES + "test_a_head_that_another_has_written_is_replaced_for_those_who_come_later",
    ),
    Bug(
        "batches are applied again, or late",
        "prefix_index/feed.py",
        "        if batch.number <= follower.number:\n",
        "        if not batch.number:\n",
        RULES + "test_a_batch_that_comes_twice_or_late_is_not_applied_over_what_came_after_it",
    ),
    Bug(
        "evicted blocks stay in the index",
        "engine/scheduling/block_pool.py",
        "                self._changes.evicted(block_hash)\n",
        "                pass\n",
        RULES + "test_stored_and_evicted_blocks_are_seen_within_50_ms",
    ),
    Bug(
        "a dropped cache stays in the index",
        "engine/scheduling/block_pool.py",
        "            self._changes.dropped()\n",
        "            pass\n",
        RULES + "test_stored_and_evicted_blocks_are_seen_within_50_ms",
    ),
    Bug(
        "entries of an earlier life count again",
        "prefix_index/view.py",
        "        if (worker, incarnation) in self._ended:\n",
        "        if not worker:\n",
        VIEW + "test_the_next_incarnation_voids_the_one_before_for_good",
    ),
    Bug(
        "entries of a worker that left stay in the view",
        "prefix_index/feed.py",
        "            self.view.forget(worker, incarnation)\n",
        "            pass\n",
        FORGERIES + "test_entries_of_a_worker_that_is_no_member_are_forgotten_and_not_read",
    ),
    Bug(
        "anybody's entries count",
        "prefix_index/entries.py",
        "        if not hmac.compare_digest(entry[:TAG_BYTES], self._tag(kind, life, body)):\n",
        "        if not life:\n",
        FORGERIES + "test_forged_entries_are_counted_and_change_nothing",
    ),
    Bug(
        "a worker's entries count for another",
        "prefix_index/entries.py",
        '        hashed.update(kind + struct.pack("<IQ", len(name), incarnation) + name)\n',
        "        hashed.update(kind)\n",
        FORGERIES + "test_forged_entries_are_counted_and_change_nothing",
    ),
    Bug(
        "a missing batch goes unnoticed",
        "prefix_index/feed.py",
        "        if batch.number != follower.number + 1:\n",
        "        if batch.number < follower.number:\n",
        RULES + "test_a_batch_that_is_lost_or_late_is_noticed_by_its_number_and_made_good[lost]",
    ),
    Bug(
        "of a block that came and went, the first word counts",
        "engine/scheduling/block_changes.py",
        "        changes.pop(block_hash, None)\n        changes[block_hash] = is_stored\n",
        "        changes.setdefault(block_hash, is_stored)\n",
        CHANGES + "test_the_last_word_on_each_block_is_kept_oldest_first",
    ),
    Bug(
        "a store that forgot is not filled again",
        "prefix_index/publisher.py",
        "                self._void()\n            self._renewed_at",
        "                pass\n            self._renewed_at",
        RULES + "test_an_emptied_store_is_filled_again_within_5_s",
    ),
    Bug(
        "an idle store counts as down",
        "cluster/redis/prefix_store.py",
        "TIMER_S = 0.15\n",
        "TIMER_S = 0.0\n",
        "tests/contract/test_prefix_store.py::test_a_call_that_waits_in_vain_is_no_failure[redis]",
    ),
    Bug(
        "blocks behind a gap are counted",
        "prefix_index/view.py",
        "            if holding & seen != holding:\n",
        "            if not holding & seen:\n",
        VIEW + "test_leading_blocks_are_counted_for_each_worker",
    ),
    Bug(
        "changes that do not fit are forgotten",
        "engine/scheduling/block_changes.py",
        "            changes.clear()\n            self._is_whole_due = True\n",
        "            changes.clear()\n",
        CHANGES + "test_too_many_changes_are_none_and_the_whole_content_is_due",
    ),
    Bug(
        "a bug in publishing ends the index",
        "prefix_index/publisher.py",
        '        with contained("publishing cached blocks"):\n',
        "        if True:\n",
        RULES + "test_a_bug_at_either_end_is_logged_and_the_index_goes_on",
    ),
    Bug(
        "names of blocks are the same in every scope",
        "core/block_hash.py",
        "(content_digest, adapter, scope)",
        "(content_digest, adapter)",
        "seeds 0-20",
    ),
    Bug(
        "workers that are no members stay in the view",
        "prefix_index/feed.py",
        "            self.view.forget(worker, incarnation)\n",
        "            pass\n",
        CLUSTER + "test_a_holder_that_dies_is_forgotten_and_its_chat_is_exact_elsewhere",
    ),
    Bug(
        "entries of a worker's earlier life count",
        "prefix_index/entries.py",
        'struct.pack("<IQ", len(name), incarnation)',
        'struct.pack("<IQ", len(name), 0)',
        FORGERIES + "test_entries_of_a_workers_earlier_life_are_refused_in_the_log_of_this_one",
    ),
    Bug(
        "a publisher leaves evictions out",
        "prefix_index/publisher.py",
        "PrefixChange(stored, evicted, tier)",
        "PrefixChange(stored, (), tier)",
        RULES + "test_stored_and_evicted_blocks_are_seen_within_50_ms",
    ),
    Bug(
        "a gap in a log is passed over",
        "prefix_index/feed.py",
        "            follower.wanted = batch.number - 1\n",
        "            pass\n",
        "seeds 0-60",
    ),
    Bug(
        "what was cached outlives the memory it was in",
        "engine/scheduling/block_pool.py",
        "        self._identities.forget_all()\n",
        "        pass\n",
        CLUSTER + "test_ranks_that_return_with_empty_memory_take_their_blocks_out_of_every_view",
    ),
    Bug(
        "more tokens are reported as cached than were found",
        "engine/scheduling/step_planner.py",
        "            sequence.num_prefix_hit_tokens, sequence.num_computed_tokens\n",
        "            sequence.num_prefix_hit_tokens, sequence.num_computed_tokens + 1\n",
        CLUSTER + "test_another_tenant_neither_goes_there_for_it_nor_finds_it",
    ),
    Bug(
        "a router reads each batch for itself",
        "prefix_index/feed.py",
        "        return BATCHES_S\n",
        "        return 0.0\n",
        RULES + "test_what_many_workers_publish_is_read_together",
    ),
]
