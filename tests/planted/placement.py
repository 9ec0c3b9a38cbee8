"""Bugs of placement by predicted cost, and the tests that notice them."""

from planted.bug import Bug

COST = "tests/unit/router/test_cost.py"
EXPECTED = "tests/unit/router/test_expected_prefixes.py"
LATENESS = (
    "tests/simulation/test_lateness.py::"
    "test_a_route_on_which_kv_comes_late_is_measured_and_left_alone_until_it_may_have_healed"
)
LOAD = "tests/unit/router/workers/test_load.py"
PLACEMENT = "tests/unit/router/test_placement.py"
REPLAY = "tests/unit/simulation/test_replay.py"
TENANTS = "tests/component/test_tenants.py::"
REPORT = "tests/unit/router/observe/test_prompt_report.py::"
BUGS = [
    Bug(
        "a single token is handed over",
        "router/placement.py",
        "    is_single = request.sampling.max_tokens == 1",
        "    is_single = False",
        f"{PLACEMENT}::test_a_single_token_is_not_handed_over_whatever_the_path",
    ),
    Bug(
        "a tenant may ask who holds what another one asked",
        "router/http/api.py",
        "            identity.check(Right.OPERATE)\n",
        "",
        TENANTS + "test_a_tenant_sees_who_holds_its_own_prompts_and_an_admin_sees_anybodys",
    ),
    Bug(
        "a prompt that is on its way is shown as published",
        "router/observe/prompt_report.py",
        "            num_published = len(tiers)",
        "            num_published = held[worker]",
        REPORT + "test_holders_are_shown_by_tier_with_what_is_on_its_way_and_the_choice",
    ),
    Bug(
        "a prompt whose scores are wanted is explained as fetched",
        "router/observe/prompt_report.py",
        "may_fetch=not has_scores)",
        "may_fetch=True)",
        REPORT + "test_a_prompt_whose_scores_are_wanted_is_shown_as_computed_whole",
    ),
    Bug(
        "leading blocks are looked for in the pool's tier alone",
        "prefix_index/view.py",
        "        tiers = sorted(holder.keys.items())\n        for key",
        "        tiers = sorted(holder.keys.items())[:1]\n        for key",
        "tests/unit/prefix_index/test_view.py"
        "::test_each_leading_block_lies_in_the_fastest_of_its_tiers",
    ),
    Bug(
        "the longest prefix wins",
        "router/cost.py",
        "            tokens = queued + WORK_WEIGHT * uncached + occupied",
        "            tokens = WORK_WEIGHT * uncached + occupied",
        f"{COST}::test_a_holder_is_chosen_until_its_queue_costs_more_than_its_prefix_saves",
    ),
    Bug(
        "prompts that come to idle workers gather at the first holder of a shared block",
        "router/cost.py",
        "WORK_WEIGHT * uncached + occupied",
        "WORK_WEIGHT * uncached",
        f"{REPLAY}::test_conversations_stay_where_they_are_cached_and_the_shared_block_gathers_nobody",
    ),
    Bug(
        "local_below_tokens counts what is cached",
        "router/path_choice.py",
        "    if best.uncached_tokens < rules.local_below_tokens:",
        "    if best.uncached_tokens + best.cached_tokens < rules.local_below_tokens:",
        f"{COST}::test_local_below_tokens_counts_what_the_local_worker_lacks",
    ),
    Bug(
        "a report counts beside the prompts that it counts",
        "router/candidate.py",
        "        tokens_of_others = max(0, load.waiting_tokens - self.reported_tokens)",
        "        tokens_of_others = load.waiting_tokens",
        f"{LOAD}::test_a_report_is_not_counted_beside_the_prompts_that_it_counts",
    ),
    Bug(
        "a prompt on its way is expected for ever",
        "router/expected_prefixes.py",
        "        while self._ends and self._ends[0][0] <= now_s:",
        "        while False:",
        f"{EXPECTED}::test_a_prompt_on_its_way_counts_until_its_worker_has_had_time_to_tell",
    ),
    Bug(
        "a small difference of speed gathers prompts at one worker",
        "router/cost.py",
        "usual if not own or slow <= own <= fast else own",
        "usual if not own else own",
        f"{COST}::test_speeds_that_hardly_differ_do_not_gather_prompts_at_the_fastest",
    ),
    Bug(
        "the replay's view hears of no eviction",
        "simulation/replay.py",
        "            change = PrefixChange(*changes.take(len(changes)))",
        "            change = PrefixChange(changes.take(len(changes))[0])",
        f"{REPLAY}::test_nobody_waits_for_a_prefix_that_was_evicted",
    ),
    Bug(
        "the configured speed of workers counts for nobody",
        "router/cost.py",
        "if speeds else rules.prefill_tokens_per_s",
        "if speeds else 8_000.0",
        f"{COST}::test_until_speeds_are_measured_the_settings_say_what_a_token_costs",
    ),
    Bug(
        "no hand-over is measured",
        "router/attempts.py",
        "            session.handed_over(placement.decode, attempt.exposed_transfer_s)",
        "            del session",
        LATENESS,
    ),
    Bug(
        "a route that was late once is late for ever",
        "router/workers/load.py",
        "        if self._hand_overs.forget_old(now_s):",
        "        if self._hand_overs.forget_old(0.0):",
        LATENESS,
    ),
    Bug(
        "receivers are chosen as if KV reached all of them as soon",
        "router/cost.py",
        "                running + max(0.0, late - least_s) * per_s\n",
        "                running\n",
        f"{COST}::test_a_receiver_is_left_for_one_that_gets_its_kv_sooner",
    ),
    Bug(
        "a step's noise chooses the receiver",
        "router/cost.py",
        "            least_s = min(late_s) + NOISE_S",
        "            least_s = min(late_s)",
        f"{COST}::test_a_receiver_is_left_for_one_that_gets_its_kv_sooner",
    ),
    Bug(
        "what an earlier attempt exposed counts for one that exposed nothing",
        "router/attempt_state.py",
        "        return self.run.exposed_transfer_s if self.prefill_spoke else 0.0",
        "        return self.run.exposed_transfer_s",
        "tests/unit/router/test_attempt_state.py"
        "::test_a_hand_over_is_told_once_with_what_was_exposed_of_it",
    ),
    Bug(
        "workers without a partner hide those that have one",
        "router/placement.py",
        "    for number in (MAX_SHOWN, len(prefill)):",
        "    for number in (MAX_SHOWN,):",
        f"{PLACEMENT}::test_the_cheapest_with_a_partner_serves_however_many_cheaper_ones_have_none",
    ),
    Bug(
        "KV is sent to blocks that do not fit",
        "router/placement.py",
        "    return same if fitting == sizes else",
        "    return same if fitting else",
        f"{PLACEMENT}::test_kv_goes_to_blocks_of_a_multiple_and_to_no_others",
    ),
    Bug(
        "of many workers the first are compared, not the best",
        "router/cost.py",
        "    return [pool[key[-1]] for key in keys[:number]]",
        "    return sorted((pool[key[-1]] for key in keys[:number]), key=lambda c: c.worker_id)",
        f"{PLACEMENT}::"
        "test_who_serves_both_phases_is_found_by_room_then_sequences_then_blocks_in_use",
    ),
    Bug(
        "the warm-up of a replay counts in its TTFT",
        "simulation/replay.py",
        "        if job.sent_s >= self._plan.warm_up_s:\n",
        "        if True:\n",
        f"{REPLAY}::test_prompts_of_the_warm_up_fill_the_caches_and_are_in_no_figure_of_ttft",
    ),
]
