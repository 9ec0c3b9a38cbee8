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
        "        elif one.shares_tier_with(sequence) and",
        "        elif False and",
        WORKER_TURNS + "test_blocks_are_yielded_too_to_an_arrival_as_well",
    ),
    Bug(
        "who yields in its own tier takes its place again",
        "engine/scheduling/block_supply.py",
        "                self._sequences.waiting.move_before(yielding[-1].due, sequence)\n",
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
        "canaries wait in line",
        "worker/worker.py",
        " | {CANARY_TIER: -CANARY_LEAD_S}",
        "",
        "tests/simulation/test_tenant_rules.py::test_a_router_stays_ready_beside_a_flood",
    ),
    Bug(
        "a tenant's sequences are numbered when they are made, all alike",
        "engine/scheduling/tenant_turns.py",
        "        newcomer.number = self._num_of[newcomer.tenant] / newcomer.weight",
        "        newcomer.number = 0.0",
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
