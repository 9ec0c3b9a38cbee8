"""Bugs of order: who gets blocks and budget, who is overtaken, who is told."""

from planted.bug import Bug

UNIT = "tests/unit/engine/scheduling/test_scheduler_fairness.py"
WHOLE = "tests/simulation/test_fairness_rules.py"
TURNS = "tests/unit/engine/scheduling/test_tenant_turns.py"

BUGS = [
    Bug(
        "a preempted sequence goes to the end of the line",
        "engine/scheduling/block_supply.py",
        "        sequence.status = Status.WAITING\n        self._sequences.waiting.add",
        "        sequence.due = (1e9, sequence.key)\n"
        "        sequence.status = Status.WAITING\n        self._sequences.waiting.add",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_an_answer_that_lost_its_blocks_goes_before_whoever_came_later",
    ),
    Bug(
        "arrivals take blocks before anybody who waits",
        "engine/scheduling/scheduler.py",
        "        for sequence in self.blocks.fitting(Status.RESERVING, lends=lends):\n"
        "            self._reserve(",
        "        for sequence in list(self.waiting.ready):\n"
        "            if sequence.status is Status.RESERVING:\n"
        "                self._reserve(",
        f"{WHOLE}::test_nobody_stands_still_in_mid_answer_while_many_later_ones_are_served",
    ),
    Bug(
        "more answers run at once than a step has tokens for",
        "worker/worker.py",
        "max(1, min(engine.max_sequences, engine.max_step_tokens - 1))",
        "engine.max_sequences",
        f"{WHOLE}::test_no_more_answers_run_at_once_than_a_step_has_tokens_for",
    ),
    Bug(
        "nobody hears of a preemption",
        "engine/scheduling/block_supply.py",
        "            self._events.add(Preempted(sequence, tuple(pins)))\n",
        "",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_blocks_that_a_transfer_may_read_stay_pinned_when_their_sequence_loses_them",
    ),
    Bug(
        "a start that nobody has heard of is told after its end",
        "engine/scheduling/block_supply.py",
        "        if handover is not None and not self._events.withdraw_start(sequence):\n",
        "        if handover is not None:\n",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_blocks_that_a_transfer_may_read_stay_pinned_when_their_sequence_loses_them",
    ),
    Bug(
        "the oldest prompt takes the whole budget",
        "engine/scheduling/step_planner.py",
        "num_half = -(-step.num_left // 2)",
        "num_half = step.num_left",
        f"{UNIT}::test_small_prompts_behind_a_giant_are_in_the_next_step",
    ),
    Bug(
        "long steps leave prompts nothing beside the answers that run",
        "engine/scheduling/step_budget.py",
        "self._limits.max_sequences + MIN_STEP_TOKENS",
        "max(self._limits.max_sequences, MIN_STEP_TOKENS)",
        f"{UNIT}::test_a_prompt_goes_on_beside_as_many_answers_as_may_run_however_long_steps_are",
    ),
    Bug(
        "a giant gets what small ones leave",
        "engine/scheduling/step_planner.py",
        "        step.num_left -= num_kept\n",
        "        num_kept = 0\n",
        f"{UNIT}::test_a_giant_has_half_of_the_budget_however_many_come_after_it",
    ),
    Bug(
        "what does not fit blocks everybody behind it",
        "engine/scheduling/block_supply.py",
        "                if sequence.num_overtaken < MAX_OVERTAKEN:\n",
        "                if False:\n",
        f"{WHOLE}::test_small_hand_overs_pass_a_giant_that_waits_for_blocks_and_it_is_served",
    ),
    Bug(
        "blocks are never kept for what does not fit",
        "engine/scheduling/block_supply.py",
        "                if sequence.num_overtaken < MAX_OVERTAKEN:\n",
        "                if True:\n",
        f"{UNIT}::test_what_does_not_fit_is_passed_a_bounded_number_of_times"
        "_and_then_blocks_are_kept_for_it",
    ),
    Bug(
        "announcements to all partners share one bound",
        "engine/scheduling/queues.py",
        "        if first is None or self.ready.num_before(first) >= MAX_READY:\n",
        "        if sum(len(p.announced) for p in self._partners.values()) >= MAX_UNANSWERED:\n",
        "tests/unit/engine/scheduling/test_scheduler_partners.py::"
        "test_a_partner_that_does_not_answer_holds_up_its_own_hand_overs_alone",
    ),
    Bug(
        "what runs ahead of its partner comes before what has one",
        "engine/scheduling/queues.py",
        "        yield from self.ready.walk()\n        lines = [",
        "        lines = [list(self.ready)] + [",
        "tests/unit/engine/scheduling/test_scheduler_partners.py::"
        "test_what_runs_ahead_of_its_partner_comes_last_and_is_computed_once",
    ),
    Bug(
        "what runs ahead is computed again and again",
        "engine/scheduling/block_supply.py",
        "handover.is_announced and not handover.ran_ahead and is_roomy",
        "handover.is_announced and is_roomy",
        "tests/unit/engine/scheduling/test_scheduler_partners.py::"
        "test_what_runs_ahead_of_its_partner_comes_last_and_is_computed_once",
    ),
    Bug(
        "blocks given up in a plan that comes back empty wait for a wake-up",
        "engine/scheduling/scheduler.py",
        "            if step.items or self.num_preemptions == num_preemptions:\n",
        "            if True:\n",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_blocks_given_up_by_one_that_cannot_go_on_are_handed_out_in_the_same_plan",
    ),
    Bug(
        "what comes free in a long step is nobody's before its end",
        "worker/attempts.py",
        "        if self._step_loop.plan is not None:\n            self.scheduler.reserve_in_turn(",
        "        if False:\n            self.scheduler.reserve_in_turn(",
        "tests/simulation/test_reservation_rules.py::"
        "test_a_place_that_comes_free_in_the_midst_of_a_long_step_is_the_next_reservations",
    ),
    Bug(
        "a place in a step is anybody's, whoever is next for it",
        "engine/scheduling/block_supply.py",
        "            walk.num_places_kept += fits\n",
        "",
        f"{UNIT}::test_an_arrival_does_not_take_the_place_that_an_older_prompt_gets"
        "_with_the_next_step",
    ),
    Bug(
        "room is kept for one that gets no budget, whoever else could use it",
        "engine/scheduling/block_supply.py",
        "            if is_asked_for or lends or not fits:\n",
        "            if lends or not fits:\n",
        f"{UNIT}::test_room_kept_for_one_that_has_no_budget_yet_is_lent_to_smaller_ones",
    ),
    Bug(
        "room is kept from arrivals for one that gets no budget",
        "engine/scheduling/scheduler.py",
        "        self._reserve_fitting(now_s, lends=True)\n",
        "",
        f"{UNIT}::test_room_kept_for_one_that_has_no_budget_yet_is_lent_to_arrivals",
    ),
    Bug(
        "one that was passed often enough still goes behind what is shorter",
        "engine/scheduling/step_planner.py",
        "    return sequence.num_overtaken < MAX_OVERTAKEN, sequence.num_missing_tokens\n",
        "    return True, sequence.num_missing_tokens\n",
        f"{UNIT}::test_a_prompt_behind_a_giant_is_passed_by_shorter_ones_a_bounded_number_of_times",
    ),
    Bug(
        "a prompt under route is passed by shorter ones as often as they come",
        "engine/scheduling/step_planner.py",
        "        _count_passed(step, behind)\n",
        "",
        f"{UNIT}::test_a_prompt_under_way_behind_a_giant_is_passed_a_bounded_number_of_times"
        "_for_each_part",
    ),
    Bug(
        "arrivals run beside one that must run alone for ever",
        "engine/scheduling/block_supply.py",
        "            if _needs_every_place(sequence):\n",
        "            if False:\n",
        f"{UNIT}::test_nobody_runs_beside_one_that_must_run_alone_once_it_was_passed_often_enough",
    ),
    Bug(
        "arrivals go before an older one that must run alone and could",
        "engine/scheduling/block_supply.py",
        "            if _needs_every_place(sequence):\n",
        "            if _needs_every_place(sequence) and not fits:\n",
        f"{UNIT}::test_an_arrival_does_not_go_before_an_older_one_that_can_run_alone"
        "_with_the_next_step",
    ),
    Bug(
        "partners without hand-overs are remembered for ever",
        "engine/scheduling/queues.py",
        "            if not partner:\n",
        "            if False:\n",
        "tests/unit/engine/scheduling/test_scheduler_partners.py::"
        "test_partners_without_hand_overs_are_forgotten",
    ),
    Bug(
        "what arrived in memory that is gone is told to new ranks",
        "engine/scheduling/scheduler.py",
        "        self._sequences.ranks_are_gone()\n        self._arrived.clear()\n",
        "        self._sequences.ranks_are_gone()\n",
        "tests/unit/engine/scheduling/test_scheduler.py"
        "::test_what_arrived_in_memory_that_is_gone_is_not_taken_in_by_new_ranks",
    ),
    Bug(
        "an arrival needs no place",
        "engine/scheduling/sequences.py",
        "for s in self.running) + len(self.arriving)",
        "for s in self.running)",
        f"{UNIT}::test_an_arrival_has_its_place_from_its_reservation_on",
    ),
    Bug(
        "parked answers yield to one that does not fit all the same",
        "engine/scheduling/block_supply.py",
        "        if has_place and 0 < num_lacking <= walk.num_yielding:\n",
        "        if has_place and 0 < num_lacking:\n",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_nobody_yields_to_one_that_would_not_fit_all_the_same",
    ),
    Bug(
        "a block is given away while the running step copies from it",
        "engine/scheduling/scheduler.py",
        "        if not self.waiting.num_reservations or self._sequences.copies_from_free:\n",
        "        if not self.waiting.num_reservations:\n",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_a_block_that_the_running_step_copies_from_is_given_to_nobody",
    ),
    Bug(
        "a watch of the search that breaks is not noticed",
        "simulation/trial.py",
        "        await watching  # a watch that broke has watched nothing: that is no clean "
        "trial\n",
        "        pass\n",
        "tests/simulation/test_trials.py::test_a_watch_that_breaks_is_no_clean_trial",
    ),
    Bug(
        "the oldest is the victim",
        "engine/scheduling/block_supply.py",
        "for s in reversed(self._sequences.running) if s.key not in planned",
        "for s in self._sequences.running if s.key not in planned",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_the_youngest_by_arrival_gives_its_blocks_also_after_it_came_back",
    ),
    Bug(
        "only those in the step wait for its end to free their blocks",
        "engine/scheduling/sequences.py",
        "        if self.executing:\n",
        "        if sequence.key in self.executing:\n",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py::"
        "test_blocks_of_one_cancelled_in_a_step_are_nobody_elses_before_its_end",
    ),
    Bug(
        "a request tried again is the youngest",
        "engine/scheduling/scheduler.py",
        "self._order.due_at(request, now_s - age_s)",
        "self._order.due_at(request, now_s)",
        f"{UNIT}::test_age_travels_so_a_request_tried_again_keeps_its_place",
    ),
    Bug(
        "tenants of one tier take no turns in a worker",
        "engine/scheduling/scheduler.py",
        "        self._sequences.turns.enter(sequence)\n",
        "",
        f"{TURNS}::test_those_who_wait_are_served_in_rounds",
    ),
    Bug(
        "what a tenant runs does not count for its turn",
        "engine/scheduling/tenant_turns.py",
        "newcomer.number = self._counts[newcomer.tenant].num_came",
        "newcomer.number = sum(s.tenant == newcomer.tenant for s in self._waiting)",
        f"{TURNS}::test_what_runs_counts_so_that_one_at_a_time_is_no_way_to_more_turns",
    ),
    Bug(
        "forks are not counted for their tenant",
        "engine/scheduling/results.py",
        "            self._sequences.turns.count(fork)\n",
        "",
        f"{TURNS}::test_what_has_ended_counts_no_more",
    ),
    Bug(
        "a prompt that has forked counts for ever",
        "engine/scheduling/sequences.py",
        "        self._finish(sequence)\n\n    def _finish",
        "        sequence.status = Status.FINISHED\n\n    def _finish",
        f"{TURNS}::test_what_has_ended_counts_no_more",
    ),
    Bug(
        "a newcomer passes an answer that lost its blocks",
        "engine/scheduling/tenant_turns.py",
        "            and waiting.started_at is None\n",
        "",
        f"{TURNS}::test_an_answer_that_lost_its_blocks_is_passed_by_nobody",
    ),
    Bug(
        "a newcomer passes those of a higher tier",
        "engine/scheduling/sequence.py",
        "        return is_other and self.delay_s == other.delay_s",
        "        return is_other",
        f"{TURNS}::test_a_tier_is_passed_by_no_tenant_of_another",
    ),
    Bug(
        "who moves up goes before those who did so earlier",
        "engine/scheduling/sequence.py",
        "    return (*place[:-1], key, inf)",
        "    return (*place[:-1], -key, inf)",
        f"{TURNS}::test_who_goes_before_the_same_one_keeps_the_order_of_coming",
    ),
]
