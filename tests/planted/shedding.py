"""Bugs of refusing what cannot be served in time: too late, too dear, untruthful, or everything."""

from planted.bug import Bug

EARLY = "tests/component/test_early_refusals.py::"
STATUS = "tests/component/test_stream_status.py::"

BUGS = [
    Bug(
        "a full router reads a body before it refuses it",
        "router/http/app.py",
        "    app.add_middleware(EarlyRefusal, check_open=service.check_open)\n",
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
]
