"""Bugs of what is said about a request that has ended: its regret, and who may ask."""

from planted.bug import Bug

ATTEMPT = "tests/unit/router/test_attempt_state.py::"
REGRET = "tests/unit/router/test_regret.py::"
TELEMETRY = "tests/unit/router/observe/test_telemetry.py::"

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
        "        (path, cost.worker_id): cost\n",
        "        (placement.path, cost.worker_id): cost\n",
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
        "local or (pair.receiver,))",
        "local)",
        "tests/unit/router/test_cost.py::test_why_says_what_each_candidate_would_have_cost",
    ),
]
