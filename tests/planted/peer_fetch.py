"""Bugs of fetching prefixes from peers."""

from planted.bug import Bug

RULES = "tests/simulation/test_peer_fetch_rules.py::"
FAULTS = "tests/simulation/test_peer_fetch_faults.py::"
SOURCES = "tests/unit/router/test_prefix_sources.py::"
BLOCKS = "tests/unit/engine/scheduling/test_prefix_blocks.py::"

BUGS = [
    Bug(
        "a holder sends what an index says, to whatever scope",
        "worker/prefix_offers.py",
        "self._prefixes.prefix(message.token_ids, message.scope)",
        'self._prefixes.prefix(message.token_ids, "")',
        FAULTS + "test_a_prompt_of_another_scope_is_not_sent_whatever_an_index_says",
    ),
    Bug(
        "blocks that a peer reads are not pinned",
        "engine/scheduling/prefix_blocks.py",
        "            self._pool.share(block_id)\n",
        "            pass\n",
        BLOCKS + "test_what_is_cached_is_pinned_by_its_tokens_and_scope",
    ),
    Bug(
        "peers may read the whole pool",
        "engine/scheduling/prefix_blocks.py",
        "        if self.num_read + len(hits) > self._num_most:\n",
        "        if self.num_read < 0:\n",
        BLOCKS + "test_peers_read_no_more_than_half_of_the_pool",
    ),
    Bug(
        "a prefix takes the blocks that others wait for",
        "engine/scheduling/prefix_blocks.py",
        "num_kept = self._tables.blocks_for(first.num_tokens) if first is not None else 0",
        "num_kept = 0",
        BLOCKS + "test_who_waits_for_blocks_comes_first",
    ),
    Bug(
        "blocks are granted that a running step still copies from",
        "engine/scheduling/prefix_blocks.py",
        "        if self._sequences.copies_from_free:\n",
        "        if self.num_read < 0:\n",
        BLOCKS + "test_no_room_is_a_refusal_and_takes_nothing[step]",
    ),
    Bug(
        "a device does not load what was fetched",
        "engine/scheduling/prefix_blocks.py",
        "        self._note_arrived(prefix.block_table[num_here:])\n",
        "",
        BLOCKS + "test_what_arrived_is_cache_and_the_next_prompt_hits_it",
    ),
    Bug(
        "a refusal waits for an offer that never comes",
        "worker/prefix_offers.py",
        "            self._post(self._agent.decline, transfer_id)\n",
        "",
        FAULTS + "test_a_holder_that_has_evicted_it_refuses_at_once",
    ),
    Bug(
        "a slow holder is waited for until its lease ends",
        "worker/prefix_fetches.py",
        "call_later(source.wait_s, late)",
        "call_later(30.0, late)",
        FAULTS + "test_a_slow_holder_is_waited_for_no_longer_than_computing_takes",
    ),
    Bug(
        "a fetch that failed fails its request",
        "worker/prefix_fetches.py",
        "        self._give_up(transfer_id, FetchOutcome.NOT_HELD if is_unknown else "
        "FetchOutcome.FAILED)\n",
        "        self._attempts.end(self._fetches[transfer_id].attempt, error)\n",
        FAULTS + "test_wrong_bytes_are_asked_for_again_and_then_computed",
    ),
    Bug(
        "KV that arrived in a pool of before becomes cache",
        "worker/prefix_fetches.py",
        "        if fetch.pool_generation != self._kv.generation:\n",
        "        if fetch.pool_generation < 0:\n",
        FAULTS + "test_kv_that_arrived_before_the_pool_was_replaced_is_not_cached",
    ),
    Bug(
        "a request that leaves keeps its fetch",
        "worker/attempts.py",
        "            self.transfers.fetches.end(attempt)\n",
        "            pass\n",
        FAULTS + "test_a_request_that_leaves_while_its_prefix_comes_leaves_nothing_behind",
    ),
    Bug(
        "what did not arrive keeps its blocks",
        "worker/prefix_fetches.py",
        "            self._prefixes.release(fetch.prefix)\n",
        "            pass\n",
        FAULTS + "test_a_request_that_leaves_while_its_prefix_comes_leaves_nothing_behind",
    ),
    Bug(
        "what is on its way to a worker is fetched from there",
        "router/placer.py",
        "        published = self._prefixes.published(names)\n",
        "        published = self._prefixes.held(names)\n",
        RULES + "test_what_is_only_on_its_way_to_a_worker_is_not_fetched_from_there",
    ),
    Bug(
        "a holder at which fetches fail is asked again at once",
        "router/prefix_sources.py",
        "            if speeds.is_resting(descriptor, now_s):\n",
        "            if now_s < 0:\n",
        SOURCES + "test_a_holder_at_which_fetches_fail_rests",
    ),
    Bug(
        "a fetch is made at any price",
        "router/cost.py",
        "        if exposed_s >= saved_s:\n",
        "        if exposed_s < 0:\n",
        SOURCES + "test_what_is_computed_faster_than_asked_for_is_computed",
    ),
    Bug(
        "a prefix without first tokens ends as a hand-over with nothing to decode",
        "kv_transfer/sender.py",
        "        if first_tokens and len(final_choices) == len(first_tokens):\n",
        "        if len(final_choices) == len(first_tokens):\n",
        RULES + "test_a_prefill_worker_fetches_from_a_prefill_worker",
    ),
    Bug(
        "an offer takes the id of a hand-over under way",
        "worker/transfers.py",
        "        if self._is_here(message.transfer_id):\n",
        "        if message.transfer_id in self.fetches:\n",
        FAULTS + "test_a_transfer_has_one_id_whatever_it_carries",
    ),
    Bug(
        "a fetch that was given up while it dialled is opened all the same",
        "kv_transfer/receive_stream.py",
        "                    if receiver.is_closed:\n                        return\n",
        "",
        "tests/unit/kv_transfer/test_receiver_faults.py"
        "::test_a_fetch_that_is_given_up_while_it_dials_is_not_opened",
    ),
    Bug(
        "a device's stage is sent, which holds what was there before",
        "worker/prefix_offers.py",
        "        if self._exports_kv:\n",
        "        if blocks == []:\n",
        FAULTS + "test_a_device_that_keeps_its_kv_to_itself_declines_whatever_it_is_asked",
    ),
    Bug(
        "workers are asked for KV that their device keeps",
        "router/prefix_sources.py",
        " or not descriptor.exports_kv:\n",
        ":\n",
        "tests/component/test_peer_fetch.py"
        "::test_what_a_decode_workers_device_keeps_to_itself_is_not_fetched",
    ),
    Bug(
        "a conversation hops from worker to worker",
        "router/cost.py",
        "                    doubled = FETCH_WEIGHT * fetch.num_gained\n",
        "",
        SOURCES + "test_a_prefix_stays_with_its_holder_until_that_is_busier_than_a_copy_is_dear",
    ),
    Bug(
        "a fetch under the id of a hand-over takes what is reported of it",
        "worker/transfers.py",
        "        if source is None or self._is_here(source.transfer_id):\n",
        "        if source is None:\n",
        FAULTS + "test_a_fetch_under_the_id_of_a_hand_over_leaves_it_alone",
    ),
    Bug(
        "a prefix is fetched from a holder's disk",
        "router/prompt_prefixes.py",
        "found |= self._view.match(hashes, StorageTier.POOL)",
        "found |= self._view.match(hashes)",
        "tests/unit/router/test_prompt_prefixes.py"
        "::test_what_lies_on_a_holders_disk_alone_is_held_and_is_no_source",
    ),
    Bug(
        "blocks that await KV never fill exactly half of a pool",
        "engine/scheduling/prefix_blocks.py",
        "if self.num_reserved + num_new > self._num_most:",
        "if self.num_reserved + num_new >= self._num_most:",
        BLOCKS + "test_half_of_the_pool_is_what_peers_may_read_or_fill",
    ),
    Bug(
        "holders that failed once are remembered for ever",
        "router/prefix_sources.py",
        "            if len(self._resting) > MAX_RESTING:\n"
        "                self._resting.popitem(last=False)\n",
        "",
        SOURCES + "test_of_holders_at_rest_the_oldest_is_forgotten",
    ),
    Bug(
        "an offer may be longer than any prompt",
        "worker/checking.py",
        '    _check_count("token_ids", offer.token_ids, max_model_len)\n',
        "",
        "tests/unit/worker/test_checking.py::test_an_offer_that_cannot_be_is_refused_by_its_field",
    ),
]
