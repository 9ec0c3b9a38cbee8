"""Bugs of refusing what cannot be served in time: too late, too dear, untruthful, or everything."""

from planted.bug import Bug

EARLY = "tests/component/test_early_refusals.py::"
WAIT = "tests/unit/router/test_expected_wait.py::"
ADMISSION = "tests/unit/router/test_admission_predictions.py::"
QUEUES = "tests/unit/router/test_tier_queues.py::"
SHED = "tests/unit/router/test_load_shedding.py::"
PREDICTED = "tests/component/test_predicted_waits.py::"
STATUS = "tests/component/test_stream_status.py::"

BUGS = [
    Bug(
        "a full router reads a body before it refuses it",
        "router/http/app.py",
        "    app.add_middleware(EarlyRefusal, arrive=service.arrive)\n",
        "",
        EARLY + "test_a_full_router_refuses_before_it_reads_a_long_body",
    ),
    Bug(
        "a full router reads a message before it refuses it",
        "router/grpc/auth.py",
        "            if details.method in REQUEST_METHODS:\n",
        "            if False:\n",
        EARLY + "test_a_full_router_refuses_before_it_reads_a_long_message",
    ),
    Bug(
        "a full router asks those to come again who may not ask at all",
        "router/http/early_refusal.py",
        "                identity.check(Right.GENERATE)\n",
        "",
        EARLY + "test_who_may_not_ask_gets_the_same_answer_from_a_full_router",
    ),
    Bug(
        "a refusal counts for the tier of the key, whatever was asked for",
        "router/service.py",
        "        calls.asks_for(tier)\n        if others",
        "        if others",
        EARLY + "test_what_finds_no_room_once_it_is_read_counts_for_the_tier_that_it_asks_for",
    ),
    Bug(
        "a full router does not say who holds a prompt",
        "router/service.py",
        "await self._builder.make(params))",
        "(await self.prepare([params]))[0][0])",
        EARLY + "test_what_needs_no_permit_is_answered_by_a_full_router",
    ),
    Bug(
        "a router that shuts down counts its refusals over gRPC as the callers' faults",
        "router/grpc/auth.py",
        "        call.refuse(error.code, outcome_of(error))\n",
        "        call.refuse(error.code)\n",
        EARLY + "test_a_router_that_shuts_down_reads_nothing_more",
    ),
    Bug(
        "a comment says 200 to a request that is refused later",
        "router/http/sse.py",
        "            if not events and not self._group.is_admitted:\n",
        "            if False:\n",
        STATUS + "test_a_stream_that_is_refused_after_it_has_waited_is_a_503",
    ),
    Bug(
        "a request that waits for its permit counts as admitted",
        "router/orchestrator.py",
        "        return run is not None and run.timeline.admitted_at is not None\n",
        "        return run is not None\n",
        STATUS + "test_a_stream_is_kept_alive_from_when_it_has_its_permit",
    ),
    Bug(
        "a stream that has its permit is never kept alive",
        "router/orchestrator.py",
        "        return run is not None and run.timeline.admitted_at is not None\n",
        "        return False\n",
        STATUS + "test_a_stream_is_kept_alive_from_when_it_has_its_permit",
    ),
    Bug(
        "releases of a router that is not full count as its rate",
        "router/expected_wait.py",
        "        if self._is_awaited:\n            if not self._is_fresh",
        "        if True:\n            if not self._is_fresh",
        WAIT + "test_releases_that_nobody_waits_for_say_nothing_of_how_fast_there_could_be_some",
    ),
    Bug(
        "a rate holds for ever",
        "router/expected_wait.py",
        "        if num < MIN_INTERVALS or not self._is_fresh(now_s):\n",
        "        if num < MIN_INTERVALS:\n",
        SHED + "test_after_a_stretch_without_releases_and_a_jump_of_the_clock_everybody_is_let_in",
    ),
    Bug(
        "one pause of the cluster refuses those who come after it",
        "router/expected_wait.py",
        "        return (sum(self._intervals_s) - max(self._intervals_s)) / (num - 1)\n",
        "        return sum(self._intervals_s) / num\n",
        WAIT + "test_the_time_between_releases_is_known_of_late_or_not_at_all",
    ),
    Bug(
        "a speed that is no number refuses everybody",
        "router/expected_wait.py",
        "    return c.prefill_tokens_per_s if 0 < c.prefill_tokens_per_s < inf else inf\n",
        "    return c.prefill_tokens_per_s or inf\n",
        WAIT + "test_what_workers_report_counts_where_it_is_a_number",
    ),
    Bug(
        "a speed that is no number stays in a worker's mean",
        "router/workers/load.py",
        "or not 0 < seconds < math.inf:",
        "or seconds <= 0:",
        "tests/unit/router/workers/test_load.py",
    ),
    Bug(
        "a prediction keeps an idle router idle",
        "router/load_shedding.py",
        "        if not ahead.num_running:\n            return None\n",
        "",
        SHED + "test_one_request_always_runs_whatever_is_predicted",
    ),
    Bug(
        "a short prompt is refused for the queue of workers that it does not go to",
        "router/load_shedding.py",
        "num_tokens is not None and num_tokens >= self._rules.local_below_tokens",
        "num_tokens is not None",
        SHED + "test_prompts_wait_for_the_workers_that_would_compute_them",
    ),
    Bug(
        "a request waits for a permit that will come after its deadline",
        "router/admission.py",
        "num_tokens, request.deadline_at, on_expected",
        "num_tokens, None, on_expected",
        PREDICTED + "test_a_deadline_that_cannot_be_met_is_not_waited_for",
    ),
    Bug(
        "who will wait in vain is told so after the wait",
        "router/admission.py",
        "self._shedding.too_late(tier, ahead) if has_place else",
        "None if has_place else",
        PREDICTED + "test_over_http_it_is_a_503_that_says_when",
    ),
    Bug(
        "a tenant waits behind all that another has",
        "router/fair_queue.py",
        "                num_ahead += min(len(one.waiters), max(0, num_passes))\n",
        "                num_ahead += len(one.waiters)\n",
        "tests/unit/router/test_fair_queue.py::"
        "test_a_newcomer_knows_how_many_have_their_turn_before_it",
    ),
    Bug(
        "a backlog of a lower tier refuses a higher one",
        "router/tier_queues.py",
        "        return 0 if since_s < 0 else",
        "        return len(self.waiters) if since_s < 0 else",
        ADMISSION + "test_a_newcomer_waits_for_those_who_go_before_it_and_for_no_others",
    ),
    Bug(
        "a lower tier is let in as if higher ones did not wait",
        "router/tier_queues.py",
        "[(num, one.max_running_share) for one, num in others if num]",
        "[]",
        ADMISSION + "test_a_newcomer_waits_for_those_who_go_before_it_and_for_no_others",
    ),
    Bug(
        "a tier that may not have a permit counts as taking every turn",
        "router/tier_queues.py",
        "        if num_due <= share * num / left:\n",
        "        if True:\n",
        QUEUES + "test_a_tier_takes_no_more_turns_than_its_share_before_a_newcomer",
    ),
    Bug(
        "a tier that has its share counts on the permits of others",
        "router/load_shedding.py",
        "is_awaited=is_share_awaited)",
        "is_awaited=False)",
        ADMISSION + "test_a_tier_that_has_its_share_waits_for_its_own_permits_alone",
    ),
    Bug(
        "a caller is refused for its own tier before it has asked for another",
        "router/admission.py",
        "dict.fromkeys((tier, *others))",
        "(tier,)",
        EARLY + "test_a_caller_is_refused_early_only_where_no_tier_open_to_it_has_room",
    ),
    Bug(
        "a caller is told of its own tier although another has room before",
        "router/admission.py",
        "min(shortages, key=lambda one: one.room_in_s)",
        "shortages[0]",
        ADMISSION + "test_who_may_ask_for_more_tiers_is_refused_if_none_has_room_and_told_of_the"
        "_first_that_will",
    ),
    Bug(
        "who is refused comes back in a second, however long the queue is",
        "router/load_shedding.py",
        "        return self._expected(tier, ahead, IDLE, self._clock.now_s()).permit_s\n",
        "        return 1.0\n",
        SHED + "test_who_found_no_place_comes_again_when_those_before_it_will_be_gone",
    ),
    Bug(
        "those who were refused together come back together",
        "router/load_shedding.py",
        "self._ids.spread(bounded_wait_s(room_in_s), JITTER_SHARE)",
        "room_in_s",
        SHED + "test_who_found_no_place_comes_again_when_those_before_it_will_be_gone",
    ),
    Bug(
        "a client of whole seconds comes back before there is room",
        "router/http/errors.py",
        "str(ceil(wait_s))",
        "str(round(wait_s))",
        "tests/unit/router/http/test_errors.py",
    ),
    Bug(
        "over gRPC everybody comes back in a second",
        "router/grpc/requests.py",
        "delay.FromMilliseconds(round(wait_s * 1000))",
        "delay.FromMilliseconds(1000)",
        PREDICTED + "test_over_grpc_it_is_in_the_details",
    ),
    Bug(
        "a prompt is refused for the prefill pool though an idle decode worker would compute it",
        "router/load_shedding.py",
        "return rules.min_local_saving < 1 and not c.num_decoding",
        "return False",
        SHED + "test_prompts_wait_for_the_workers_that_would_compute_them",
    ),
    Bug(
        "a prompt counts on decode workers that it would not be given to",
        "router/load_shedding.py",
        "return rules.min_local_saving < 1 and not c.num_decoding",
        "return True",
        SHED + "test_prompts_wait_for_the_workers_that_would_compute_them",
    ),
]
