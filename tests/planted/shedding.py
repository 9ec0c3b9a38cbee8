"""Bugs of refusing what cannot be served in time: too late, too dear, untruthful, or everything."""

from planted.bug import Bug

EARLY = "tests/component/test_early_refusals.py::"

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
]
