"""Bugs of what is reported of the prefix cache, and the tests that notice them."""

from planted.bug import Bug

CACHED = "tests/simulation/test_cached_tokens.py::"
BUGS = [
    Bug(
        "a reply over gRPC does not say why",
        "router/grpc/server.py",
        "    why.update(a.why)\n",
        "",
        "tests/unit/router/grpc/test_server.py"
        "::test_a_reply_says_why_a_request_went_where_it_did_as_over_http",
    ),
    Bug(
        "a trace does not say why",
        "router/observe/timing.py",
        '        "baton.why": json.dumps(timing.why),\n',
        '        "baton.why": json.dumps({}),\n',
        "tests/simulation/test_spans.py::test_a_requests_span_says_what_it_cost",
    ),
    Bug(
        "what decode holds is reported as not computed",
        "decode_worker/role.py",
        "            cached_tokens=0,\n",
        "",
        CACHED + "test_what_decode_holds_is_not_sent_but_was_computed",
    ),
    Bug(
        "a request that resumes finds its own prompt",
        "router/request_state.py",
        "        if old.prefill_s:\n",
        "        if not self:\n",
        CACHED + "test_after_a_death_a_request_does_not_count_what_it_computed_itself",
    ),
    Bug(
        "output that a client resumes with is reported as cached prompt",
        "router/request_state.py",
        "            cached_tokens=min(cached_tokens, len(self.request.token_ids)),",
        "            cached_tokens=cached_tokens,",
        "tests/unit/router/test_attempt_state.py"
        "::test_no_more_is_reported_as_cached_than_the_prompt_has",
    ),
]
