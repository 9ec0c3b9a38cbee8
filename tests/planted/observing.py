"""Bugs of what operators see: metrics that flatter, dashboards and tables that show nothing."""

from planted.bug import Bug

ATTAINMENT = "tests/unit/router/observe/test_attainment.py::"
TELEMETRY = "tests/unit/router/observe/test_telemetry.py::"
DASHBOARDS = "tests/repository/test_dashboards.py::"
FIGURES = "tests/unit/cli/test_top_figures.py::"
TOP = "tests/unit/cli/test_top.py::"

BUGS = [
    Bug(
        "who is refused does not count against the SLO",
        "router/observe/attainment.py",
        'return outcome == "failed" or code in OVERLOAD_CODES',
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
        "        self._count_result(call.tier, attainment.result_of_call(call))\n",
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
        "a metric is renamed and the dashboard is not",
        "core/metrics.py",
        '"baton_worker_waiting_tokens"',
        '"baton_worker_prompt_tokens"',
        DASHBOARDS + "test_every_query_names_metrics_of_ours_with_their_labels",
    ),
    Bug(
        "an alert asks for a label that its metric has not",
        "deploy/prometheus/baton.rules.yaml",
        'baton_api_keys{state="lost_file"}',
        'baton_api_keys{code="lost_file"}',
        DASHBOARDS + "test_every_query_names_metrics_of_ours_with_their_labels",
    ),
    Bug(
        "an alert has no section of the troubleshooting page",
        "deploy/prometheus/baton.rules.yaml",
        "docs/troubleshooting.md#batonretries",
        "docs/troubleshooting.md#batonattempts",
        DASHBOARDS + "test_every_alert_has_its_words_and_its_section",
    ),
    Bug(
        "the figures of a router that restarted are compared with those before",
        "cli/top_figures.py",
        "            self._snapshots.clear()\n",
        "            pass\n",
        FIGURES + "test_a_router_that_restarts_begins_a_new_window",
    ),
    Bug(
        "rates are since the command began",
        "cli/top_figures.py",
        "            self._snapshots.popleft()\n",
        "            break\n",
        FIGURES + "test_the_window_is_the_last_minute",
    ),
    Bug(
        "a tier is given the attainment of all",
        "cli/top_figures.py",
        'growth.of(metrics.SLO_REQUESTS, name, "met")',
        "growth.of(metrics.SLO_REQUESTS)",
        FIGURES + "test_a_tier_has_its_queue_and_the_attainment_of_this_window",
    ),
    Bug(
        "a router that restarts ends the command that watches it",
        "cli/top.py",
        '        return {**window.figures(), "error": error.message}\n',
        "        raise\n",
        TOP + "test_a_router_that_restarts_is_asked_again_and_one_that_never_answers_is_an_error",
    ),
    Bug(
        "Ctrl-C is an error of the command that it ends",
        "cli/top.py",
        "contextlib.suppress(KeyboardInterrupt)",
        "contextlib.suppress(ZeroDivisionError)",
        TOP + "test_ctrl_c_is_no_error_of_the_command",
    ),
    Bug(
        "what a worker had counted is news once its session begins anew",
        "router/observe/growing_counts.py",
        "            last[label] = max(last[label], number)\n",
        "            last[label] = number\n",
        "tests/unit/router/observe/test_storage_gauges.py::"
        "test_what_was_counted_is_no_news_when_a_session_or_a_worker_begins_anew",
    ),
    Bug(
        "preemptions fall when a worker's session begins anew",
        "router/observe/worker_gauges.py",
        "        metrics.WORKER_PREEMPTIONS: read_preemptions,\n",
        "        metrics.WORKER_PREEMPTIONS: lambda: _summed(\n"
        "            ((name,), view.load.num_preemptions) for name, view in _named(read())\n"
        "        ),\n",
        "tests/unit/router/observe/test_worker_gauges.py::"
        "test_preemptions_only_grow_over_sessions_and_starts_of_a_worker",
    ),
    Bug(
        "no worker reports a preemption",
        "worker/worker.py",
        "                num_preemptions=scheduler.num_preemptions,\n",
        "",
        "tests/component/test_sampling_exactness.py",
    ),
    Bug(
        "usage is made without what prefill says a moment later",
        "router/attempts.py",
        "            await attempt.prefill_report(min(REPORT_WAIT_S, left_s / 2))\n",
        "",
        "tests/simulation/test_late_reports.py",
    ),
    Bug(
        "a whole answer waits for prefill as long as it may",
        "router/attempts.py",
        "min(REPORT_WAIT_S, left_s / 2)",
        "left_s / 2",
        "tests/simulation/test_late_reports.py",
    ),
    Bug(
        "a gap as long as a bound counts as longer",
        "router/observe/gap_histogram.py",
        "from bisect import bisect_left\n",
        "from bisect import bisect_right as bisect_left\n",
        "tests/unit/router/observe/test_gap_histogram.py"
        "::test_a_gap_counts_in_every_bucket_from_its_own_on",
    ),
]
