"""Bugs of the router and its sessions: what was lost, leaked, misjudged or took others with it."""

from planted.bug import Bug

LINKS = "tests/unit/router/workers/test_sessions.py"
LINK_RULES = "tests/simulation/test_link_rules.py"
CONTAINMENT = "tests/simulation/test_containment_rules.py"
PLACEMENT = "tests/unit/router/test_placement.py"
PARTS = "tests/unit/router/test_admission.py"
TURNS = "tests/unit/router/test_turns.py"

BUGS = [
    Bug(
        "a request that is admitted at time 0 counts as queued until its first token",
        "router/observe/timing.py",
        "    if line.admitted_at is not None:\n",
        "    if line.admitted_at:\n",
        "tests/simulation/test_spans.py::test_a_request_that_is_admitted_at_time_0_has_not_queued",
    ),
    Bug(
        "credit taken between two attempts is lost",
        "router/orchestrator.py",
        "        if run is None:\n            return\n        limit = num_positions",
        "        if run is None or run.run_id not in self._attempts.in_progress:\n"
        "            return\n"
        "        limit = num_positions",
        "tests/simulation/test_survival_rules.py"
        "::test_what_a_client_takes_while_nobody_serves_it_counts_for_the_next_attempt",
    ),
    Bug(
        "what decode says after the prompt's scores goes before what it said",
        "router/attempt_state.py",
        "            for later in (*held, delta) if is_decode else held:\n",
        "            for later in (delta, *held) if is_decode else held:\n",
        "tests/unit/router/test_attempt_state.py::"
        "test_what_decode_said_early_goes_before_what_it_says_after_the_prompts_scores",
    ),
    Bug(
        "a worker with nothing to do leaves before its routers have heard of it",
        "worker/worker.py",
        "        await asyncio.sleep(leave_s)\n",
        "",
        "tests/simulation/test_drain.py"
        "::test_what_was_placed_on_a_worker_before_its_drain_was_heard_of_moves",
    ),
    Bug(
        "an ended attempt whose output breaks is never told",
        "worker/router_session.py",
        "        self.touch(attempt)  # `fail` does not touch one that had ended already\n",
        "",
        "tests/unit/worker/test_attempt.py"
        "::test_an_ended_attempt_whose_output_breaks_is_told_as_ended",
    ),
    Bug(
        "a request's fault takes the session",
        "router/workers/subscriptions.py",
        '                with contained("the delivery of tokens", subscriber.fail):\n'
        "                    subscriber.on_delta(self._worker_id, delta)",
        "                subscriber.on_delta(self._worker_id, delta)",
        f"{CONTAINMENT}::test_a_decoder_that_raises_ends_its_request_alone",
    ),
    Bug(
        "a session goes with its task",
        "router/workers/sessions.py",
        '                with contained(f"the session with worker {descriptor.worker_id}"):\n'
        "                    await self._sessions[key].run()",
        "                await self._sessions[key].run()",
        f"{LINKS}::test_a_links_own_fault_is_told_to_who_listens_and_the_worker_is_dialled_again",
    ),
    Bug(
        "an order that fails takes the session",
        "worker/session_server.py",
        "                    self._commands.credit(message)",
        "                    pass\n                self._commands.credit(message)",
        "tests/unit/worker/test_session_server.py::"
        "test_an_order_that_fails_harms_its_attempt_and_not_the_session",
    ),
    Bug(
        "a fault at the beginning of an attempt leaves its parts behind",
        "worker/attempts.py",
        "        except Exception as fault:  # noqa: BLE001 - an attempt's fault ends the attempt",
        "        except ServingError as fault:",
        f"{CONTAINMENT}::test_what_a_failed_beginning_had_begun_is_given_back_at_once",
    ),
    Bug(
        "a worker that is ready again wakes nobody",
        "router/workers/session.py",
        "        self._set_state(is_ready=message.is_ready)",
        "        self._is_ready = message.is_ready",
        f"{LINK_RULES}::test_a_request_that_comes_while_ranks_restart_goes_on_when_they_are_up",
    ),
    Bug(
        "after a fault three seconds are all",
        "router/attempts.py",
        "                if self._sessions.is_starting():",
        "                if after is None and self._sessions.is_starting():",
        f"{LINK_RULES}::test_after_a_fault_a_request_waits_as_long_as_ranks_are_starting",
    ),
    Bug(
        "a hung worker behind a new stream is not found",
        "router/workers/liveness.py",
        "        self._awake.tick()\n        self.note_message()",
        "        self._awake.tick()\n        self.note_message()\n"
        "        self._moved_at = self._received_at",
        f"{LINK_RULES}::test_a_hung_worker_behind_a_stream_that_breaks_again_and_again_is_found",
    ),
    Bug(
        "own sleep counts as a worker's silence",
        "core/awake_clock.py",
        "min(self._clock.now_s() - self._ticked_at, MAX_COUNTED_S)",
        "self._clock.now_s() - self._ticked_at",
        "tests/unit/core/test_awake_clock.py",
    ),
    Bug(
        "a late greeting takes the session over",
        "worker/session_server.py",
        "        if hello.stream_number < session.stream_number:",
        "        if False:",
        "tests/unit/worker/test_session_server.py::"
        "test_a_greeting_that_comes_late_does_not_take_the_session_from_a_newer_stream",
    ),
    Bug(
        "a permit granted as its waiter gives up is lost",
        "router/admission.py",
        "        timer = loop.call_later(wait_s, self._refuse, waiter, wait_s)\n"
        "        try:\n"
        "            await granted\n",
        "        timer = loop.call_later(9e9, self._refuse, waiter, wait_s)\n"
        "        try:\n"
        "            async with asyncio.timeout(self._queue_wait_s):\n"
        "                await granted\n"
        "        except TimeoutError as error:\n"
        '            raise Overloaded("no permit in time") from error\n',
        f"{PARTS}::"
        "test_a_permit_that_comes_in_the_turn_in_which_its_waiter_gives_up_is_used_or_passed_on",
    ),
    Bug(
        "a prompt is load until its answer ends",
        "router/workers/subscriptions.py",
        "        self._load.answered(item.run_id, self._clock.now_s())\n        return subscriber",
        "        return subscriber",
        f"{LINKS}::"
        "test_a_prompt_is_load_until_the_workers_first_word_and_the_request_until_it_is_forgotten",
    ),
    Bug(
        "a Submit that was half sent is cancelled as unwanted",
        "router/workers/subscriptions.py",
        "        for run_id, subscriber in list(self._subscribers.items()):\n",
        "        for run_id, subscriber in list(self._subscribers.items()):\n"
        "            if run_id in queued:\n                continue\n",
        f"{LINK_RULES}::test_a_submit_that_arrived_before_its_write_returned_is_served_once",
    ),
    Bug(
        "a full worker costs a fault",
        "router/request_state.py",
        "isinstance(error, Draining | PoolExhausted)",
        "isinstance(error, Draining)",
        f"{LINK_RULES}::test_moves_are_no_faults_but_they_are_bounded",
    ),
    Bug(
        "moves without end",
        "router/attempts.py",
        "MAX_MOVES = 32",
        "MAX_MOVES = 320",
        f"{LINK_RULES}::test_moves_are_no_faults_but_they_are_bounded",
    ),
    Bug(
        "bystanders of a rank's death are suspected",
        "worker/worker.py",
        "error if was_in_step else WorkerLost(error.message)",
        "error",
        f"{LINK_RULES}::test_who_was_not_in_the_step_that_killed_the_ranks_is_not_suspected",
    ),
    Bug(
        "a worker that was never reached is said to have died",
        "router/workers/session.py",
        "kind = WorkerDied if was_live else WorkerLost",
        "kind = WorkerDied",
        f"{LINKS}::test_only_a_worker_that_was_reached_can_have_died",
    ),
    Bug(
        "a full decode worker is chosen for its few sequences",
        "router/cost.py",
        "        return roomy or full\n",
        "        return [*roomy, *full]\n",
        f"{PLACEMENT}::test_room_for_the_prompt_comes_before_few_sequences",
    ),
    Bug(
        "tokens that were sent are not counted",
        "router/candidate.py",
        "self.pending_tokens + tokens_of_others",
        "tokens_of_others",
        f"{PLACEMENT}::test_tokens_that_were_sent_and_not_answered_count_as_prefill_load",
    ),
    Bug(
        "what comes for another epoch is delivered",
        "router/workers/subscriptions.py",
        "        if subscriber is None or subscriber.epoch != item.epoch:",
        "        if subscriber is None:",
        f"{LINKS}::test_news_of_other_epochs_and_of_nobody_are_dropped",
    ),
    Bug(
        "who cannot say what it wants takes the session down",
        "router/workers/subscriptions.py",
        'with contained("what a request still wants", subscriber.fail):',
        "if True:",
        f"{LINKS}::test_who_cannot_say_what_it_wants_ends_alone_and_the_others_are_asked_for",
    ),
    Bug(
        "what the engine says after the end is logged",
        "worker/attempts.py",
        "attempt.epoch != sequence.epoch or attempt.ended is not None",
        "attempt.epoch != sequence.epoch",
        f"{LINK_RULES}::test_what_the_engine_says_after_an_attempts_end_is_not_told",
    ),
    Bug(
        "a greeting that cannot be read is nobody's fault",
        "worker/session_server.py",
        'contained("the greeting of a router"),',
        "contextlib.nullcontext(),",
        "tests/unit/worker/test_session_server.py::"
        "test_a_greeting_that_cannot_be_read_ends_its_stream_alone_and_is_logged",
    ),
    Bug(
        "a heartbeat renews no lease",
        "worker/session_server.py",
        "            self._commands.router_alive(session.router_id)",
        "            pass",
        "tests/unit/worker/test_session_server.py::test_whatever_comes_from_a_router_renews_its_leases",
    ),
    Bug(
        "credit is renewed only when all of it is used",
        "router/orchestrator.py",
        "        if limit - run.credit < self._config.credit_positions // 2:",
        "        if limit - run.credit < self._config.credit_positions:",
        f"{LINK_RULES}::test_credit_is_renewed_when_half_of_it_is_used_and_not_before",
    ),
    Bug(
        "prefill's late troubles end an answer",
        "router/attempt_state.py",
        "        return is_prefill and self.decode_spoke",
        "        return False",
        f"{LINK_RULES}::test_troubles_of_prefill_count_only_until_decode_has_spoken",
    ),
    Bug(
        "a burst is one retry longer than it says",
        "router/retry_budget.py",
        "(burst - 1) / per_s",
        "burst / per_s",
        "tests/unit/router/test_retry_budget.py::test_a_burst_is_as_many_retries_as_it_says",
    ),
    Bug(
        "a request that moves is young again",
        "router/submits.py",
        "        age_s=max(0.0, now_s - run.timeline.received_at),\n",
        "",
        f"{LINK_RULES}::test_a_submit_carries_the_age_of_its_request",
    ),
    Bug(
        "a router that is behind wakes all consumers at once",
        "router/turns.py",
        "            self._num_woken += 1\n",
        "",
        f"{TURNS}::test_so_many_are_woken_in_a_turn_and_the_others_after_them_in_order",
    ),
    Bug(
        "whoever has a new token goes to the end of the line",
        "router/turns.py",
        "            self._waiting[consumer] = None\n",
        "            self._waiting[consumer] = None\n"
        "            self._waiting.move_to_end(consumer)\n",
        f"{TURNS}::test_who_waits_keeps_its_place_and_has_only_one",
    ),
    Bug(
        "a resuming client is sent again the tail that it has",
        "router/request_stream.py",
        "isinstance(event, TextDelta) and event.token_ids else None",
        "isinstance(event, TextDelta) else None",
        "tests/unit/router/test_request_stream.py"
        "::test_tokens_of_a_choice_become_one_event_when_the_router_is_behind",
    ),
    Bug(
        "a stream is kept alive no more after its first timer",
        "router/request_stream.py",
        "        self._reminder = None\n        self._has_events.set()\n",
        "        self._has_events.set()\n",
        "tests/unit/router/test_request_stream.py"
        "::test_a_wait_without_events_ends_after_its_own_time_and_not_after_anothers",
    ),
]
