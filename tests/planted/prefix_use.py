"""Bugs of what is reported of the prefix cache, and the tests that notice them."""

from planted.bug import Bug

OUTCOMES = "tests/simulation/test_prefix_outcomes.py::"
OUTCOME = "tests/unit/router/test_prefix_outcome.py::"
GAUGES = "tests/unit/router/observe/test_worker_gauges.py::"
CACHED = "tests/simulation/test_cached_tokens.py::"
BUGS = [
    Bug(
        "a reply over gRPC does not say why",
        "router/grpc/replies.py",
        "    why.update(a.why)\n",
        "",
        "tests/unit/router/grpc/test_replies.py"
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
    Bug(
        "what a request computed itself is counted as found",
        "router/attempts.py",
        "            if epoch == 0\n            else None,",
        "            if epoch >= 0\n            else None,",
        OUTCOMES + "test_what_a_request_computed_itself_before_a_death_is_no_hit",
    ),
    Bug(
        "a prompt that is computed for its scores is a stale placement",
        "router/prompt_prefixes.py",
        "        if hashes is None or request.sampling.prompt_logprobs is not None:",
        "        if hashes is None:",
        OUTCOMES + "test_a_prompt_whose_scores_are_wanted_is_computed_whole_and_expected_of_nobody",
    ),
    Bug(
        "an eviction on its way is called a wrong view",
        "router/prefix_outcome.py",
        "        if self.tokens(num_published_now) <= found:",
        "        if num_published_now < 0:",
        OUTCOMES + "test_an_eviction_that_the_router_has_not_heard_of_is_a_stale_placement",
    ),
    Bug(
        "what a prompt on its way did not bring is called a wrong view",
        "router/prefix_outcome.py",
        "        if self.tokens(len(self.tiers)) <= found:",
        "        if self.tokens(len(self.tiers)) < 0:",
        OUTCOMES + "test_what_another_prompt_was_to_bring_and_did_not_is_unfinished",
    ),
    Bug(
        "the last token is missed in a cache",
        "router/prefix_outcome.py",
        "min(num_blocks, (self.num_tokens - 1) // size) * size",
        "num_blocks * size",
        OUTCOME + "test_the_last_token_is_expected_of_nobody",
    ),
    Bug(
        "cached blocks are shown as used",
        "router/observe/worker_gauges.py",
        "num_blocks - load.free_blocks - load.cached_blocks",
        "num_blocks - load.free_blocks",
        GAUGES + "test_blocks_are_used_cached_or_free_and_queues_have_their_lengths",
    ),
    Bug(
        "a large cluster has a series for every worker",
        "router/observe/worker_gauges.py",
        " if number < MAX_WORKERS else OTHER, view",
        ", view",
        GAUGES + "test_beyond_a_number_of_workers_the_others_are_summed_up",
    ),
    Bug(
        "a router that starts is late by all that was written before",
        "prefix_index/feed.py",
        "        if self._clock.now_s() - follower.begun_at >= lag_s >= self.lag_s:",
        "        if lag_s >= self.lag_s:",
        "tests/simulation/test_prefix_rules.py"
        "::test_a_batch_that_lay_in_the_store_is_shown_as_lag_and_one_from_before_is_not",
    ),
    Bug(
        "times of several workers are shown as one of theirs",
        "router/observe/worker_gauges.py",
        "max(found.get((name,), 0.0), view.exposed_transfer_s)",
        "view.exposed_transfer_s / 2 + found.get((name,), 0.0)",
        GAUGES + "test_lateness_is_that_of_senders_and_of_the_others_together_the_longest",
    ),
]
