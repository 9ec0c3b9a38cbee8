"""Bugs of what operators see: metrics that flatter, dashboards and tables that show nothing."""

from planted.bug import Bug

ATTAINMENT = "tests/unit/router/observe/test_attainment.py::"
TELEMETRY = "tests/unit/router/observe/test_telemetry.py::"

BUGS = [
    Bug(
        "who is refused does not count against the SLO",
        "router/observe/attainment.py",
        'return outcome == "failed" or code in _OVERLOAD',
        'return outcome == "failed"',
        ATTAINMENT + "test_what_the_cluster_did_misses_and_what_the_caller_did_counts_not",
    ),
    Bug(
        "whoever leaves misses the SLO",
        "router/observe/attainment.py",
        'return MISSED if _is_ours(outcome_of(error), error.code) else ""',
        "return MISSED",
        ATTAINMENT + "test_what_the_cluster_did_misses_and_what_the_caller_did_counts_not",
    ),
    Bug(
        "only the first token counts",
        "router/observe/attainment.py",
        " and _within(line.tpot_s, tier.slo_tpot_s)",
        "",
        ATTAINMENT + "test_both_limits_count_and_none_is_no_limit",
    ),
    Bug(
        "a refusal before the request is read misses no SLO",
        "router/observe/telemetry.py",
        "        self._count_result(call.identity.tier, attainment.result_of_call(call))\n",
        "",
        "tests/component/test_early_refusals.py::"
        "test_a_full_router_refuses_before_it_reads_a_long_body",
    ),
    Bug(
        "the first fault of its kind has no rate",
        "router/observe/telemetry.py",
        '            self._counters[metrics.RETRIES].add(0, {"reason": code})\n',
        "            pass\n",
        TELEMETRY + "test_a_retry_has_a_series_before_the_first_one",
    ),
    Bug(
        "no worker reports a preemption",
        "worker/worker.py",
        "                num_preemptions=scheduler.num_preemptions,\n",
        "",
        "tests/component/test_sampling_exactness.py",
    ),
]
