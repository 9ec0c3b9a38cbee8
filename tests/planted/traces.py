"""Bugs of traces: what they leave out, say of somebody else, or cost those who have none."""

from planted.bug import Bug

TRACES = "tests/component/test_traces.py::"
TELLS = TRACES + "test_a_trace_tells_whose_a_request_was_what_it_was_charged_and_how_it_ended"
SPANS = "tests/simulation/test_spans.py::"
WAIT = SPANS + "test_a_trace_has_the_predicted_wait_beside_its_limit_and_the_wait_there_was"
ATTEMPTS = SPANS + "test_a_trace_has_every_attempt_with_its_epoch_reason_and_end"
WORKER = SPANS + "test_a_workers_span_tells_how_often_it_lost_its_blocks_or_waited_for_its_client"

BUGS = [
    Bug(
        "attributes are made for a span that nobody records",
        "router/observe/spans.py",
        "    if run.span.is_recorded:\n",
        "    if True:\n",
        TRACES + "test_nothing_is_made_for_a_span_that_nobody_records",
    ),
    Bug(
        "an unsampled span counts as recorded",
        "cluster/tracing.py",
        "return self._span.is_recording()",
        "return True",
        TRACES + "test_nothing_is_made_for_a_span_that_nobody_records",
    ),
    Bug(
        "a trace shows the tier that served as the one that was asked for",
        "router/observe/spans.py",
        '"baton.tier.asked": request.asked_tier',
        '"baton.tier.asked": request.tier',
        TELLS,
    ),
    Bug(
        "a trace does not say what a request was charged",
        "router/service.py",
        "            made = [replace(one, charged_tokens=charge.num_tokens) for one in made]\n",
        "            pass\n",
        TELLS,
    ),
    Bug(
        "a trace names the tenant",
        "router/observe/spans.py",
        '"baton.tenant_class": request.tenant_class',
        '"baton.tenant_class": request.tenant',
        TELLS,
    ),
    Bug(
        "attempts are no events of their request",
        "router/request_state.py",
        "        if self.span is not None and self.span.is_recorded:\n",
        "        if False:\n",
        ATTEMPTS,
    ),
    Bug(
        "the events of a span are in the year 1970",
        "cluster/tracing.py",
        "self._span.add_event(name, dict(attributes), int(at_s * 1e9) + self._offset_ns)",
        "self._span.add_event(name, dict(attributes), int(at_s * 1e9))",
        TELLS,
    ),
    Bug(
        "a trace has the wait but not what was predicted",
        "router/admission.py",
        "tier, ahead, num_tokens, request.deadline_at, on_expected\n",
        "tier, ahead, num_tokens, request.deadline_at\n",
        WAIT,
    ),
    Bug(
        "the limit on the predicted wait is that of another tier",
        "router/load_shedding.py",
        "on_expected(wait, self._tiers[tier].max_ttft_s)",
        "on_expected(wait, min(one.max_ttft_s for one in self._tiers.values()))",
        WAIT,
    ),
    Bug(
        "a preempted sequence does not know it",
        "engine/scheduling/block_supply.py",
        "        sequence.num_preemptions += 1\n",
        "",
        WORKER,
    ),
    Bug(
        "a client that did not read leaves no trace",
        "engine/scheduling/scheduler.py",
        "        sequence.num_parkings += sequence.is_out_of_credit\n",
        "",
        WORKER,
    ),
]
