"""Bugs of tenants in a tier: permits, turns, what a key holds, and where a tier overflows."""

from planted.bug import Bug

SERVERS = "tests/component/test_tiers.py::"
CHARGING = "tests/unit/router/test_charging.py::"
OVERFLOW = "test_what_finds_no_room_in_its_tier_is_served_in_the_next_and_the_answer_says_so"
PERMITS = "tests/unit/router/test_permits.py::"
TOKENS = "tests/unit/router/test_token_use.py::"
WORKER_TURNS = "tests/unit/engine/scheduling/test_tenant_turns.py::"
SHARE = "test_who_runs_much_yields_places_to_who_runs_little_and_no_more_than_a_share"

BUGS = [
    Bug(
        "one tenant takes the last permits of its tier",
        "router/permits.py",
        "        if num_left - num >= num_reach // KEPT_SHARE:",
        "        if num_left - num >= 0:",
        PERMITS + "test_one_tenant_leaves_an_eighth_and_a_newcomer_has_it",
    ),
    Bug(
        "a tenant's part is as large however little it weighs",
        "router/permits.py",
        "ceil(num_reach * weights.get(tenant, 1.0) / (others + 1.0))",
        "ceil(num_reach / (len(self._held[tier]) + 1.0))",
        PERMITS + "test_what_is_left_goes_by_weight_and_a_part_is_kept_for_who_may_come",
    ),
    Bug(
        "a lower tier counts on permits that a higher one holds",
        "router/permits.py",
        "min(self.share_of(tier), self._taken[tier] + self.num_free)",
        "self.share_of(tier)",
        PERMITS + "test_a_tier_keeps_an_eighth_of_what_it_can_have",
    ),
    Bug(
        "who waits for its part holds up its tier",
        "router/admission.py",
        "peek(self._is_within_part)) is not None",
        "peek()) is not None",
        PERMITS + "test_one_that_waits_for_its_part_is_passed_by_a_newcomer_of_its_tier",
    ),
    Bug(
        "who was passed makes up for it afterwards",
        "router/fair_queue.py",
        "max(self._served_pass, found.next_pass)",
        "found.next_pass",
        PERMITS + "test_who_is_passed_makes_up_for_no_turns_afterwards",
    ),
    Bug(
        "tenants are never forgotten",
        "router/permits.py",
        "        if not self._held[tier][tenant]:\n            del self._held[tier][tenant]\n",
        "",
        PERMITS + "test_a_tenant_that_has_left_is_forgotten",
    ),
    Bug(
        "turns count requests",
        "router/admission.py",
        "self._waiting.take(waiter, use.turns(waiter.tenant, waiter.num_tokens))",
        "self._waiting.take(waiter)",
        TOKENS + "test_tenants_share_a_tier_by_tokens_and_not_by_requests",
    ),
    Bug(
        "in a worker nobody of its own tier yields to a newcomer",
        "engine/scheduling/yielding.py",
        "            one.shares_tier_with(sequence)\n",
        "            False\n",
        WORKER_TURNS + "test_blocks_are_yielded_too_to_an_arrival_as_well",
    ),
    Bug(
        "who yields in its own tier takes its place again",
        "engine/scheduling/block_supply.py",
        "            self._sequences.waiting.move_before(yielding[-1].due, sequence)\n",
        "",
        WORKER_TURNS + "test_what_yielded_goes_on_token_for_token",
    ),
    Bug(
        "a newcomer's own sequences go in the wrong order when others yield to them",
        "engine/scheduling/block_supply.py",
        "move_before(yielding[-1].due, sequence)",
        "move_before(victim.due, sequence)",
        WORKER_TURNS + SHARE,
    ),
    Bug(
        "those about to run do not count as running",
        "engine/scheduling/yielding.py",
        "itertools.chain(running, starting)",
        "itertools.chain(running)",
        WORKER_TURNS + SHARE,
    ),
    Bug(
        "who has many here waits for ever behind one that keeps coming",
        "engine/scheduling/tenant_turns.py",
        "            counts.num_left += 1\n",
        "            counts.num_came -= 1\n",
        WORKER_TURNS + "test_a_tenant_that_keeps_coming_keeps_no_others_many_from_ending",
    ),
    Bug(
        "what has ended counts as long as its tenant has anything here",
        "engine/scheduling/tenant_turns.py",
        "(sequence.number - self._counts[sequence.tenant].num_left)",
        "sequence.number",
        WORKER_TURNS + "test_what_has_ended_counts_no_more_beside_what_has_not",
    ),
    Bug(
        "a tenant's newest passes its older ones",
        "engine/scheduling/tenant_turns.py",
        "if due > behind)",
        "if True)",
        WORKER_TURNS + "test_nobody_passes_what_its_own_tenant_sent_before",
    ),
    Bug(
        "who weighs little is sent away again and again",
        "engine/scheduling/yielding.py",
        "            and num_left[one.tenant] > 1\n",
        "",
        WORKER_TURNS + "test_who_weighs_little_keeps_its_oldest_answer",
    ),
    Bug(
        "those who yielded hide whoever comes later",
        "engine/scheduling/block_supply.py",
        "                    hopeless.add(kind)\n",
        "                    pass\n",
        WORKER_TURNS + "test_those_who_yielded_before_hide_no_newcomer_however_many_they_are",
    ),
    Bug(
        "newcomers are called in before one that waits to run alone",
        "engine/scheduling/block_supply.py",
        "            if _needs_every_place(sequence) or num_looked_at == LOOK_AHEAD:\n",
        "            if num_looked_at == LOOK_AHEAD:\n",
        WORKER_TURNS + "test_nobody_is_called_in_before_one_that_waits_to_run_alone",
    ),
    Bug(
        "what is parked yields for a place that it does not take",
        "engine/scheduling/block_supply.py",
        "            if victim.is_out_of_credit and num_blocks <= self._pool.num_available:\n",
        "            if False:\n",
        WORKER_TURNS + "test_what_is_parked_yields_no_place_since_it_takes_none",
    ),
    Bug(
        "some yield though the places of all would not do",
        "engine/scheduling/block_supply.py",
        "        num_active = sum(not one.is_out_of_credit for one in yielding)\n",
        "        num_active = len(yielding)\n",
        WORKER_TURNS + "test_nobody_yields_where_the_places_of_all_would_not_do",
    ),
    Bug(
        "canaries wait in line",
        "worker/worker.py",
        " | {CANARY_TIER: -CANARY_LEAD_S}",
        "",
        "tests/simulation/test_tenant_rules.py::test_a_router_stays_ready_beside_a_flood",
    ),
    Bug(
        "a tenant's sequences are numbered when they are made, all alike",
        "engine/scheduling/tenant_turns.py",
        "        newcomer.number = self._counts[newcomer.tenant].num_came",
        "        newcomer.number = 0",
        "tests/simulation/test_tenant_rules.py"
        "::test_a_tenants_flood_of_long_answers_keeps_no_other_waiting",
    ),
    Bug(
        "what finds no room in its tier is refused though it may overflow",
        "router/service.py",
        "        if others := self._builder.overflow_of(tier):\n",
        "        if others := []:\n",
        SERVERS + OVERFLOW,
    ),
    Bug(
        "what overflows is served as its first tier",
        "router/service.py",
        "self._builder.make(replace(params, request_id=request_id), tier)",
        "self._builder.make(replace(params, request_id=request_id))",
        SERVERS + OVERFLOW,
    ),
    Bug(
        "a request overflows once at most",
        "router/tiers.py",
        "        while tier := self.by_name[tier].overflow_to:\n            names.append(tier)",
        "        if tier := self.by_name[tier].overflow_to:\n            names.append(tier)",
        SERVERS + OVERFLOW,
    ),
    Bug(
        "who never opens its requests holds its tokens for ever",
        "router/charging.py",
        "weakref.finalize(self, let_go)",
        "let_go",
        CHARGING + "test_who_is_over_its_quota_or_never_opens_its_requests_holds_nothing",
    ),
    Bug(
        "an estimate within the quota is more than a key may ever hold",
        "router/charging.py",
        "min(filter(None, (limits.tokens, at_once)), default=0)",
        "limits.tokens or at_once",
        CHARGING + "test_what_could_never_be_held_is_refused_for_good",
    ),
    Bug(
        "who has one request waiting at a time pays for none of its tokens",
        "router/fair_queue.py",
        "        if tenant in self._left:\n",
        "        if False:\n",
        TOKENS + "test_tenants_share_a_tier_by_tokens_and_not_by_requests[2]",
    ),
    Bug(
        "who waited for nobody else owes turns for ever",
        "router/fair_queue.py",
        "            self._left.clear()\n",
        "            pass\n",
        "tests/unit/router/test_fair_queue.py"
        "::test_what_was_taken_while_nobody_else_waited_is_owed_to_nobody",
    ),
    Bug(
        "a key that leaves is remembered for ever",
        "router/fair_queue.py",
        "            self._left.popitem(last=False)\n",
        "            pass\n",
        "tests/unit/router/test_fair_queue.py::test_only_those_that_left_last_are_known",
    ),
    Bug(
        "who is over its quota holds its tokens for ever",
        "router/charging.py",
        "        except BaseException:\n            let_go()\n",
        "        except BaseException:\n",
        CHARGING + "test_who_is_over_its_quota_or_never_opens_its_requests_holds_nothing",
    ),
    Bug(
        "what a key holds is free when the first of a reply's requests has ended",
        "router/charging.py",
        "        if self._num_open:\n            return None\n        self._let_go()\n",
        "        self._let_go()\n        if self._num_open:\n            return None\n",
        CHARGING + "test_what_a_key_may_hold_at_once_is_free_again_when_its_requests_have_ended",
    ),
]
