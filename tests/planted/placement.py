"""Bugs of placement by predicted cost, and the tests that notice them."""

from planted.bug import Bug

COST = "tests/unit/router/test_cost.py"
EXPECTED = "tests/unit/router/test_expected_prefixes.py"
LOAD = "tests/unit/router/workers/test_load.py"
REPLAY = "tests/unit/simulation/test_replay.py"
BUGS = [
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
        "router/placement.py",
        "    if cost.uncached_tokens < constraints.rules.local_below_tokens:",
        "    if cost.uncached_tokens + cost.cached_tokens < constraints.rules.local_below_tokens:",
        f"{COST}::test_local_below_tokens_counts_what_the_local_worker_lacks",
    ),
    Bug(
        "a report counts beside the prompts that it counts",
        "router/cost.py",
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
]
