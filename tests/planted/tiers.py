"""Bugs of tiers: who gets which, who goes next, who makes room."""

from planted.bug import Bug

CHOICE = "tests/unit/router/test_tiers.py::"
SERVERS = "tests/component/test_tiers.py::"

QUEUES = "tests/unit/router/test_tier_queues.py::"
ADMISSION = "tests/unit/router/test_admission.py::"
ARRIVALS = "tests/unit/router/test_admission_arrivals.py::"
FREE = "test_a_permit_is_free_if_those_who_arrive_before_leave_one_and_one_of_the_tiers_share"
ENGINE = "tests/unit/engine/scheduling/test_scheduler_tiers.py::"
CLUSTER = "tests/simulation/test_tier_rules.py::"
TENANTS = "tests/unit/router/test_fair_queue.py::"

BUGS = [
    Bug(
        "whoever asks for a tier gets it",
        "router/tiers.py",
        "        if tier not in able:\n",
        "        if False:\n",
        SERVERS + "test_a_tier_that_a_key_may_not_have_is_refused_by_name",
    ),
    Bug(
        "a tier of equal delay counts as higher",
        "router/tiers.py",
        "if self._delay_s(name) >= own_s]",
        "if self._delay_s(name) > own_s or name == identity.tier]",
        CHOICE + "test_a_key_may_step_back_or_aside_and_not_ahead",
    ),
    Bug(
        "a header goes before the body without a word",
        "router/tiers.py",
        "if asked and in_header and asked != in_header:",
        "if False:",
        CHOICE + "test_field_and_header_may_say_the_same_and_not_two_things",
    ),
    Bug(
        "the tier's limit counts for no prompt",
        "router/request_limits.py",
        "if limit_tokens and len(token_ids) > limit_tokens:",
        "if False:",
        "tests/unit/router/test_request_builder.py"
        "::test_a_tier_limits_its_prompts_and_what_fits_is_cut_to_that",
    ),
    Bug(
        "a key of an unknown tier has a tier that is none",
        "router/access/credentials.py",
        "tier=self._tiers.of_key(who.tier),",
        "tier=who.tier,",
        "tests/unit/router/access/test_credentials.py"
        "::test_keys_of_an_unknown_tier_open_in_the_default_one_and_are_told_at_each_reading",
    ),
    Bug(
        "tiers wait in one line, first come, first served",
        "router/tier_queues.py",
        "oldest.joined_at + self.delay_s",
        "oldest.joined_at",
        ADMISSION + "test_a_newcomer_of_a_higher_tier_goes_first_until_the_others_have_waited"
        "_their_delay",
    ),
    Bug(
        "a tier that has waited its delay still stands back",
        "router/tier_queues.py",
        "oldest.joined_at + self.delay_s",
        "1e6 * self.delay_s + oldest.joined_at",
        ADMISSION + "test_a_newcomer_of_a_higher_tier_goes_first_until_the_others_have_waited"
        "_their_delay",
    ),
    Bug(
        "not the lowest tier makes room",
        "router/tier_queues.py",
        "key=lambda one: -one.delay_s",
        "key=lambda one: one.delay_s",
        QUEUES + "test_the_lowest_tier_makes_room_first_and_there_the_newest_of_the_busiest_tenant",
    ),
    Bug(
        "a burst takes every permit",
        "router/permits.py",
        "return max(1, int(self.num_permits * self._tiers[tier].max_running_share))",
        "return self.num_permits",
        SERVERS + "test_a_burst_of_batch_requests_leaves_permits_for_others_at_both_servers",
    ),
    Bug(
        "a tier that may take all permits is passed while it lacks some",
        "router/permits.py",
        "return share == self.num_permits or self._taken[tier] + num <= share",
        "return self._taken[tier] + num <= share",
        ADMISSION + "test_a_large_request_is_not_passed_by_those_that_are_due_after_it",
    ),
    Bug(
        "weights of tenants count for nothing",
        "router/fair_queue.py",
        "return max(1, round(STRIDE / self._weights.get(tenant, 1.0)))",
        "return STRIDE",
        ADMISSION + "test_within_a_tier_tenants_take_turns_by_their_weights",
    ),
    Bug(
        "who comes back has its turn at once",
        "router/fair_queue.py",
        "return self._served_pass + self._stride_of(tenant)",
        "return self._served_pass",
        TENANTS + "test_turns_follow_weights_and_coming_back_gains_none",
    ),
    Bug(
        "workers know no tiers",
        "worker/worker.py",
        "{name: tier.delay_s for name, tier in tiers.items()}",
        "{}",
        CLUSTER + "test_a_chat_beside_a_hundred_long_batch_prompts_is_served_before_them",
    ),
    Bug(
        "a lower tier has half of the budget beside a giant of a higher one",
        "engine/scheduling/step_planner.py",
        "if s.delay_s <= giant.delay_s or s.due[0] <= step.now_s]",
        "]",
        ENGINE + "test_a_prompt_under_way_holds_nothing_of_the_next_step_from_a_higher_tier",
    ),
    Bug(
        "a lower tier that has waited its delay still gets what is left",
        "engine/scheduling/step_planner.py",
        "if s.delay_s <= giant.delay_s or s.due[0] <= step.now_s]",
        "if s.delay_s <= giant.delay_s]",
        ENGINE + "test_who_has_waited_its_delay_shares_with_a_long_prompt_of_a_higher_tier",
    ),
    Bug(
        "a lower tier keeps its blocks and places",
        "engine/scheduling/scheduler.py",
        "            self.blocks.give_way()\n",
        "",
        ENGINE + "test_a_place_is_given_up_within_a_step",
    ),
    Bug(
        "what has waited its delay is taken from",
        "engine/scheduling/sequence.py",
        "return self.delay_s > other.delay_s and self.due > other.due",
        "return self.delay_s > other.delay_s",
        ENGINE + "test_nothing_is_taken_from_the_own_tier_from_those_that_are_due_or_in_vain",
    ),
    Bug(
        "blocks are taken in vain",
        "engine/scheduling/block_supply.py",
        "        if not self._has_room(num_left, num_places - num_active):",
        "        if False:",
        ENGINE + "test_nothing_is_taken_from_the_own_tier_from_those_that_are_due_or_in_vain",
    ),
    Bug(
        "announcements of a lower tier count against a higher one",
        "engine/scheduling/queues.py",
        "self.announced.num_before(first) >= MAX_UNANSWERED",
        "len(self.announced) >= MAX_UNANSWERED",
        ENGINE + "test_unanswered_announcements_of_a_lower_tier_hold_up_no_higher_one",
    ),
    Bug(
        "whoever is still being made is not counted",
        "router/service.py",
        "leave = self._admission.arrive(tier, tenant, is_whole=True)",
        "leave = calls.arrived",
        "tests/component/test_early_refusals.py"
        "::test_a_burst_is_refused_while_those_before_it_are_still_tokenized_or_charged",
    ),
    Bug(
        "cached tokens are paid for twice",
        "core/prices.py",
        "        prompt = (prompt_tokens - cached_tokens) * self.prompt_per_mtok",
        "        prompt = prompt_tokens * self.prompt_per_mtok",
        "tests/unit/core/test_types.py::test_a_cached_token_is_charged_once_at_its_own_price",
    ),
    Bug(
        "the cost of the second prompt of a call is not said",
        "router/http/replies.py",
        "            sum(costs) if costs else None,",
        "            costs[0] if costs else None,",
        "tests/component/test_tiers.py"
        "::test_the_answer_says_what_it_cost_where_its_tier_has_prices",
    ),
    Bug(
        "whoever is being charged is not counted",
        "router/service.py",
        "            charge = await self.charging.charge(",
        "        charge = await self.charging.charge(",
        "tests/component/test_early_refusals.py"
        "::test_a_burst_is_refused_while_those_before_it_are_still_tokenized_or_charged",
    ),
    Bug(
        "a failed arrival keeps its place",
        "router/http/early_refusal.py",
        "        finally:\n            arrived()\n",
        "        finally:\n            pass\n",
        "tests/component/test_early_refusals.py"
        "::test_who_fails_or_leaves_on_the_way_leaves_its_place",
    ),
    Bug(
        "half-sent bodies keep everybody out",
        "router/admission.py",
        "first.joined_at < now_s - MAX_ARRIVAL_S",
        "first.joined_at < now_s - 60.0",
        ARRIVALS + "test_who_takes_long_to_arrive_is_not_waited_for",
    ),
    Bug(
        "a request arrives twice, by its head and by its body",
        "router/service.py",
        "        calls.arrived()\n",
        "",
        "tests/component/test_early_refusals.py"
        "::test_who_runs_has_left_its_place_though_its_answer_is_to_come",
    ),
    Bug(
        "arrivals have as many places as the queue alone",
        "router/admission.py",
        "max_arriving = max_running + max_queued\n",
        "max_arriving = max_queued\n",
        ARRIVALS + "test_as_many_arrive_as_could_run_or_wait",
    ),
    Bug(
        "a tier that may not wait may not arrive",
        "router/admission.py",
        "t.model_copy(update=NO_QUEUE_LIMITS)",
        "t",
        ARRIVALS + "test_who_may_not_wait_may_arrive_while_permits_are_free",
    ),
    Bug(
        "nobody waits for those who arrive",
        "router/admission.py",
        "queued.num_requests + arriving.num_requests,",
        "queued.num_requests,",
        ARRIVALS + "test_a_newcomer_waits_for_those_who_arrive_before_it",
    ),
    Bug(
        "permits of those who arrive count as free",
        "router/admission.py",
        "self._may_run_now(tier, tenant, arriving.num_own + 1)",
        "self._may_run_now(tier, tenant, 1)",
        ARRIVALS + FREE,
    ),
    Bug(
        "arrivals of other tiers take no permits",
        "router/admission.py",
        "            and arriving.num_requests < self._permits.num_free\n",
        "",
        ARRIVALS + FREE,
    ),
    Bug(
        "a request that is whole waits for bodies that still come",
        "router/service.py",
        "leave = self._admission.arrive(tier, tenant, is_whole=True)",
        "leave = self._admission.arrive(tier, tenant)",
        "tests/component/test_early_refusals.py::test_half_sent_bodies_refuse_none_that_is_whole",
    ),
    Bug(
        "a newcomer's own delay does not count where permits are free",
        "router/admission.py",
        "time() + self._tiers[tier].delay_s\n",
        "time()\n",
        ADMISSION + "test_a_large_request_of_a_lower_tier_is_passed_until_it_is_due",
    ),
    Bug(
        "one that waits for its tier's share holds up free permits",
        "router/admission.py",
        "if waiter and self._permits.is_within_share(waiter.tier, waiter.num_permits):",
        "if waiter:",
        ADMISSION + "test_one_that_waits_for_its_tiers_share_is_passed_however_long_it_has_waited",
    ),
    Bug(
        "fewer are due than have waited their delay",
        "router/tier_queues.py",
        "max(1, round(len(self.waiters) * since_s / span_s))",
        "int(len(self.waiters) * since_s / span_s)",
        QUEUES + "test_of_those_who_came_evenly_as_many_are_due_as_have_waited_their_delay",
    ),
    Bug(
        "a body that takes too long keeps the place of one that is whole",
        "router/admission.py",
        "        self._forget_late_arrivals()\n",
        "        if not is_whole:\n            self._forget_late_arrivals()\n",
        ARRIVALS + "test_one_that_is_whole_takes_the_place_of_a_body_that_takes_too_long",
    ),
    Bug(
        "heads do not wait for requests that are whole",
        "router/admission.py",
        "(self._arriving, self._whole) if is_whole",
        "(self._whole,) if is_whole",
        ARRIVALS + "test_a_newcomer_waits_for_those_who_arrive_before_it",
    ),
    Bug(
        "requests that are whole do not wait for one another",
        "router/admission.py",
        "(self._arriving, self._whole) if is_whole",
        "(self._arriving,) if is_whole",
        ARRIVALS + "test_a_newcomer_waits_for_those_who_arrive_before_it",
    ),
]
