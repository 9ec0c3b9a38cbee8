"""Bugs of conversations: where the next turn goes, whose keys count, what is kept for whom."""

from planted.bug import Bug

COST = "tests/unit/router/test_cost.py::"
STEERING = "tests/unit/router/test_steering.py::"
KEPT = "tests/unit/engine/scheduling/test_kept_blocks.py::"
TABLES = "tests/unit/engine/scheduling/test_block_tables.py::"

BUGS = [
    Bug(
        "a key of another tenant steers",
        "router/steering.py",
        "            workers = self._workers.get((request.tenant, key))\n",
        "            known = self._workers.items()\n"
        "            workers = next((w for (_, k), w in known if k == key), None)\n",
        STEERING + "test_a_key_is_its_tenants_own",
    ),
    Bug(
        "a key excuses any queue",
        "router/cost.py",
        "                    tokens = min(PREFERENCE * self.uncached_tokens(c), "
        "MAX_PREFERENCE_TOKENS)\n",
        "                    tokens = 1e9\n",
        COST + "test_many_requests_with_one_key_do_not_stay_at_one_worker",
    ),
    Bug(
        "a long prompt's key excuses a long queue",
        "router/cost.py",
        "                    tokens = min(PREFERENCE * self.uncached_tokens(c), "
        "MAX_PREFERENCE_TOKENS)\n",
        "                    tokens = PREFERENCE * self.uncached_tokens(c)\n",
        COST + "test_a_key_excuses_less_where_much_is_cached_and_no_more_for_a_long_prompt",
    ),
    Bug(
        "a receiver is chosen without a look at what it holds",
        "router/cost.py",
        "        if not self._held_blocks:\n            return [c.used_blocks",
        "        if self._num_tokens:\n            return [c.used_blocks",
        COST + "test_a_receiver_is_the_keys_or_a_holder_among_equals",
    ),
    Bug(
        "a turn that has ended runs until the next report",
        "router/candidate.py",
        "        num_running = num_of_others + self.pending_requests\n",
        "        num_running = max(num_reported, self.pending_requests)\n",
        "tests/unit/router/workers/test_load.py::"
        "test_what_has_ended_since_a_report_runs_no_more_and_what_was_sent_runs_at_once",
    ),
    Bug(
        "a key steers no short prompt",
        "router/cost.py",
        "        if not self._preferred:\n            return [c.num_running",
        "        if self._num_tokens:\n            return [c.num_running",
        COST + "test_a_short_prompt_stays_at_its_keys_worker",
    ),
    Bug(
        "a key forgets the prefill worker when a turn is served alone",
        "router/steering.py",
        "                workers[worker.role] = worker.worker_id\n",
        "                workers.clear()\n"
        "                workers[worker.role] = worker.worker_id\n",
        STEERING + "test_a_key_prefers_the_workers_it_used_last_of_either_role",
    ),
    Bug(
        "retention is read and forgotten on the way to the worker",
        "transport/to_worker_codec.py",
        "        keeps_prefix=w.keeps_prefix,\n",
        "",
        "tests/unit/transport/test_to_worker_codec.py::"
        "test_what_a_router_says_crosses_the_wire_whole",
    ),
    Bug(
        "a prompt that is to be kept is evicted like others",
        "engine/scheduling/block_tables.py",
        "        keeper = tenant_of(request.scope) if request.keeps_prefix else None\n",
        "        keeper = None\n",
        TABLES + "test_a_kept_conversation_outlives_others_that_come_after_it",
    ),
    Bug(
        "a tenant keeps as much as it likes",
        "engine/scheduling/kept_blocks.py",
        "            if self._counts[number] > self._max_of_owner:\n",
        "            if number < 0:\n",
        KEPT + "test_an_owner_keeps_an_eighth_and_its_oldest_gives_way",
    ),
    Bug(
        "each salt has a share of its own",
        "core/scopes.py",
        '    return tenant if separator else ""\n',
        "    return scope\n",
        "tests/unit/core/test_scopes.py::"
        "test_a_scope_is_made_of_a_tenant_and_a_salt_and_says_whose_it_is",
    ),
    Bug(
        "all tenants together keep the whole pool",
        "engine/scheduling/kept_blocks.py",
        "            elif self.num_kept > self._max_kept:\n",
        "            elif number < 0:\n",
        KEPT + "test_all_owners_together_keep_half_and_anybodys_oldest_gives_way",
    ),
    Bug(
        "a kept block stays kept when its content is gone",
        "engine/scheduling/block_pool.py",
        "                    marks.unmark(block_id)\n",
        "",
        KEPT + "test_what_is_lost_with_the_memory_is_kept_no_more",
    ),
    Bug(
        "a block that others use while it is kept is kept no more",
        "engine/scheduling/block_pool.py",
        "                if keeper is not None and is_found:\n",
        "                if keeper is not None and is_found and num_references == 0:\n",
        KEPT + "test_whoever_frees_a_block_last_it_is_kept_if_one_user_asked",
    ),
    Bug(
        "whatever follows a public beginning is public",
        "engine/scheduling/block_tables.py",
        "        if len(parents) == sequence.naming.num_public_blocks:\n",
        "        if not parents:\n",
        TABLES + "test_tenants_share_exactly_the_blocks_that_are_public",
    ),
    Bug(
        "two public beginnings of one name have one branch",
        "engine/scheduling/block_tables.py",
        '    return f"{PUBLIC_SCOPE}after {identity}{PUBLIC_SCOPE}{own}"\n',
        '    return f"{PUBLIC_SCOPE}after{PUBLIC_SCOPE}{own}"\n',
        TABLES + "test_what_follows_two_public_beginnings_of_one_name_is_not_mixed_up",
    ),
    Bug(
        "a block that is public in part is shared",
        "core/block_hash.py",
        "    num_blocks = num_tokens // block_size_tokens\n",
        "    num_blocks = -(-num_tokens // block_size_tokens)\n",
        "tests/unit/core/test_block_hash.py::"
        "test_tenants_share_the_names_of_public_blocks_and_no_others",
    ),
    Bug(
        "the beginning of a public text is public",
        "router/public_prompts.py",
        "if tuple(token_ids[: len(b)]) == b",
        "if tuple(token_ids[: len(b)]) == b[: len(token_ids)]",
        "tests/unit/router/test_public_prompts.py::"
        "test_all_of_a_public_prompt_is_public_and_what_the_template_puts_around_it",
    ),
    Bug(
        "a salt of one's own shares what is public",
        "router/request_builder.py",
        "num_public = 0 if params.cache_salt else self._public_prompts.num_tokens(token_ids)\n",
        "num_public = self._public_prompts.num_tokens(token_ids)\n",
        "tests/unit/router/test_request_builder.py::"
        "test_a_public_beginning_is_in_the_scope_unless_a_salt_asks_for_ones_own",
    ),
]
