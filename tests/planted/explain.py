"""Bugs of what is said about a request that has ended: its regret, and who may ask."""

from planted.bug import Bug

ATTEMPT = "tests/unit/router/test_attempt_state.py::"
CHARGING = "tests/unit/router/test_charging.py::"
EXPLAIN = "tests/unit/cli/test_explain.py::"
MEMORY = "tests/unit/router/observe/test_explanations.py::"
REGRET = "tests/unit/router/test_regret.py::"
TELEMETRY = "tests/unit/router/observe/test_telemetry.py::"
TENANTS = "tests/component/test_tenants.py::"
OWN = TENANTS + "test_a_tenant_is_told_of_its_own_requests_and_observers_of_all"

BUGS = [
    Bug(
        "a candidate is compared with itself",
        "router/regret.py",
        "    own = costs.pop(chosen, None)",
        "    own = costs.get(chosen)",
        REGRET + "test_regret_is_against_the_best_candidate_that_was_not_chosen",
    ),
    Bug(
        "a worker is one candidate for both paths",
        "router/regret.py",
        "{(path, cost.worker_id): cost for",
        "{(placement.path, cost.worker_id): cost for",
        REGRET + "test_a_worker_is_a_candidate_of_its_own_on_each_path",
    ),
    Bug(
        "what an attempt before has measured counts for a later one",
        "router/attempt_state.py",
        "        is_alone = self.epoch == 0 and ",
        "        is_alone = ",
        ATTEMPT + "test_what_is_not_one_attempts_own_is_not_measured",
    ),
    Bug(
        "a hand-over that never came is measured as none",
        "router/attempt_state.py",
        "        if not (is_alone and self.decode_spoke and timings.prefill_s):",
        "        if not (is_alone and timings.prefill_s):",
        ATTEMPT + "test_what_is_not_one_attempts_own_is_not_measured",
    ),
    Bug(
        "the exposed transfer is in the prediction and not in what is measured",
        "router/attempt_state.py",
        "            transfer_s=self.exposed_transfer_s,",
        "            transfer_s=0.0,",
        ATTEMPT + "test_the_phases_that_placement_predicts_are_measured",
    ),
    Bug(
        "nobody measures what a placement took",
        "router/attempts.py",
        "            run.measured = attempt.measured_by(self._clock.now_s())\n",
        "",
        "tests/simulation/test_lateness.py",
    ),
    Bug(
        "a request that was faster than every other candidate counts as regretted",
        "router/observe/telemetry.py",
        "            regret_s = max(0.0, timing.placement_regret_s)",
        "            regret_s = abs(timing.placement_regret_s)",
        TELEMETRY + "test_how_far_predictions_were_off_is_counted_by_path_and_never_below_zero",
    ),
    Bug(
        "nobody sees what a long prompt would have taken without a transfer",
        "router/placement.py",
        "        return _across(pair, prediction, found.reason, local)\n",
        "        return _across(pair, prediction, found.reason, ())\n",
        "tests/unit/router/test_cost.py::test_why_says_what_each_candidate_would_have_cost",
    ),
    Bug(
        "a router remembers every request that it has ever served",
        "router/observe/explanations.py",
        "        if len(self._ended) > self._max_explained:\n",
        "        if len(self._ended) > 10 * self._max_explained:\n",
        MEMORY + "test_the_newest_requests_are_kept_and_older_ones_make_room",
    ),
    Bug(
        "an id that runs again stays as old as it was",
        "router/observe/explanations.py",
        "        self._ended.pop(run_key, None)\n",
        "",
        MEMORY + "test_the_newest_requests_are_kept_and_older_ones_make_room",
    ),
    Bug(
        "a tenant is told of requests of another one",
        "router/service.py",
        "None if sees_all else identity.tenant)",
        "None)",
        OWN,
    ),
    Bug(
        "a scraper is told of no tenant's requests",
        "router/service.py",
        "        sees_all = identity.has(Right.OBSERVE)",
        "        sees_all = identity.has(Right.OPERATE)",
        OWN,
    ),
    Bug(
        "equal ids of two tenants are one request",
        "router/observe/explanations.py",
        "        run_key = run.request.run_key\n",
        '        run_key = ("acme", run.request.request_id)\n',
        MEMORY + "test_a_tenant_is_told_of_its_own_requests_and_whoever_sees_all_of_any",
    ),
    Bug(
        "a tenant learns by an unknown id how busy others are",
        "router/observe/explanations.py",
        "        if sees_all and self._ended:",
        "        if self._ended:",
        MEMORY + "test_an_unknown_id_is_told_how_long_requests_are_kept",
    ),
    Bug(
        "the error of a request keeps its prompt in memory",
        "router/observe/explanations.py",
        '            outcome=ended.error.code if ended.error else "ok",',
        '            outcome=ended.error or "ok",',
        MEMORY + "test_nothing_of_a_prompt_is_kept_not_even_by_the_stack_of_an_error",
    ),
    Bug(
        "an attempt that found no worker shows those of the one before",
        "router/request_state.py",
        "placement is not None and not isinstance(error, NoWorker)",
        "placement is not None",
        MEMORY + "test_attempts_moves_waits_and_the_charge_are_shown",
    ),
    Bug(
        "a move counts as a fault in what is explained",
        "router/request_state.py",
        "                isinstance(error, Draining | PoolExhausted),\n",
        "",
        MEMORY + "test_attempts_moves_waits_and_the_charge_are_shown",
    ),
    Bug(
        "what a reply has cost is told to nobody",
        "router/service.py",
        "            if cost is not None:\n",
        "            if cost is None:\n",
        OWN,
    ),
    Bug(
        "a reply's cost is what was used of it",
        "router/charging.py",
        "ReplyCost(charge.amount, charge.paid,",
        "ReplyCost(total, charge.paid,",
        CHARGING + "test_a_reply_to_several_prompts_is_one_request_and_is_settled_at_its_last_end",
    ),
    Bug(
        "one router that does not know a request answers for all",
        "cli/routers.py",
        "len(asked) >= num_routers or",
        "len(asked) >= 1 or",
        EXPLAIN + "test_routers_behind_one_address_are_asked_until_one_remembers",
    ),
    Bug(
        "a router that never answers is asked for ever",
        "cli/routers.py",
        " or num_tries >= TRIES_PER_ROUTER * num_routers",
        " or num_tries >= 10_000",
        EXPLAIN + "test_when_each_has_been_asked_the_routers_own_words_are_the_error",
    ),
    Bug(
        "an answer does not name the router that can explain it",
        "router/http/api.py",
        "        headers[ROUTER_HEADER] = self.service.explanations.router_id\n",
        "",
        TENANTS + "test_an_answer_names_the_router_that_can_explain_it",
    ),
    Bug(
        "what one router has counted is growth of another behind the same address",
        "cli/top_figures.py",
        "before.router != after.router or ",
        "",
        "tests/unit/cli/test_top_figures.py::"
        "test_another_router_begins_a_new_window_however_much_it_has_counted",
    ),
    Bug(
        "a command shows whichever router answers",
        "cli/top.py",
        "        return name == (router or name)\n",
        "        return True\n",
        "tests/unit/cli/test_top.py::"
        "test_one_router_is_watched_of_those_behind_an_address_and_another_once_it_is_gone",
    ),
    Bug(
        "who answers a command steers the terminal",
        "client/endpoints.py",
        "        return value if value.isprintable() else",
        "        return value if True else",
        "tests/unit/client/test_endpoints.py::"
        "test_what_would_steer_a_terminal_is_written_out_wherever_it_stands",
    ),
    Bug(
        "a worker's name is markup",
        "cli/console.py",
        "Console(markup=False, emoji=False)",
        "Console()",
        EXPLAIN + "test_a_name_is_shown_as_it_is_and_is_no_markup",
    ),
    Bug(
        "a server that claims a thousand routers is asked thousands of times",
        "cli/routers.py",
        "min(int(claimed), MAX_ROUTERS)",
        "int(claimed)",
        EXPLAIN + "test_a_server_that_lies_about_the_number_of_routers_neither_breaks_nor_binds_it",
    ),
]
