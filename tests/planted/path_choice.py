"""Bugs of the choice between path pd and path local by price, and the tests that notice them."""

from planted.bug import Bug

LOAD = "tests/unit/router/workers/test_load.py::"
PATH = "tests/unit/router/test_path_choice.py::"
BUGS = [
    Bug(
        "what decodes beside a prompt pays nothing for it",
        "router/cost.py",
        "            delay_s=num_delayed * uncached_tokens / tokens_per_s,",
        "            delay_s=0.0,",
        PATH + "test_a_prompt_crosses_to_a_busy_decode_worker",
    ),
    Bug(
        "requests that still wait for their prompt count as delayed",
        "router/cost.py",
        "        num_delayed = c.num_decoding\n",
        "        num_delayed = c.num_running\n",
        PATH + "test_requests_that_still_wait_for_their_prompt_elsewhere_are_not_delayed",
    ),
    Bug(
        "paths are compared by an assumed speed",
        "router/path_choice.py",
        "    if not speeds[0] and best.cached_tokens <= across.cached_tokens:",
        "    if False:",
        PATH + "test_without_a_speed_the_threshold_decides",
    ),
    Bug(
        "a spike of one speed decides the path",
        "router/path_choice.py",
        "    if all(speeds) and max(speeds) > MAX_SPEED_RATIO * min(speeds):",
        "    if False:",
        PATH + "test_speeds_that_are_too_far_apart_are_not_believed",
    ),
    Bug(
        "a speed that nobody confirms is kept for ever",
        "router/workers/load.py",
        "now_s - self._measured_at_s >= SPEED_KEPT_S:",
        "False:",
        LOAD + "test_a_speed_counts_as_not_measured_ten_minutes_after_the_last_prompt",
    ),
    Bug(
        "the transfer to any receiver counts as that to this one",
        "router/cost.py",
        "            late_s = c.exposed_by_receiver.get(receiver, c.exposed_transfer_s)",
        "            late_s = c.exposed_transfer_s",
        PATH + "test_the_transfer_counts_by_the_route_to_the_receiver",
    ),
    Bug(
        "who spared others is told to regret it",
        "router/regret.py",
        "self.predicted.delay_s - self.best_other[1].price_s",
        "self.predicted.delay_s - self.best_other[1].total_s",
        PATH + "test_the_other_path_is_regretted_by_what_it_would_have_cost_everybody",
    ),
    Bug(
        "an idle receiver is not asked where another holds a prefix",
        "router/placement.py",
        "    if all(c is not pair.receiver for c in local):",
        "    if not local:",
        PATH + "test_of_a_holder_and_an_idle_receiver_the_cheaper_one_computes",
    ),
]
