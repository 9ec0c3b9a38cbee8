"""Bugs of sampling fields on their way from an API to the draw."""

from planted.bug import Bug

FIELDS = "tests/unit/transport/test_sampling_codec.py"

BUGS: list[Bug] = [
    Bug(
        "a zero over a session is no value",
        "transport/sampling_codec.py",
        "        if wire.HasField(name):\n",
        "        if getattr(wire, name):\n",
        f"{FIELDS}::test_a_session_carries_every_field_that_a_worker_needs",
    ),
    Bug(
        "a worker draws by the seed that was asked for",
        "transport/sampling_codec.py",
        '    given["seed"] = seed\n',
        "",
        f"{FIELDS}::test_a_session_carries_every_field_that_a_worker_needs",
    ),
    Bug(
        "a zero over gRPC is no value",
        "router/grpc/requests.py",
        "        if field.name in SAMPLING\n",
        "        if field.name in SAMPLING and value\n",
        f"{FIELDS}::test_absent_is_the_default_and_zero_is_zero_over_grpc",
    ),
    Bug(
        "over HTTP a field that has another name is not read",
        "router/http/bodies.py",
        "OTHER_NAMES.get(one.name, one.name)",
        "one.name",
        f"{FIELDS}::test_every_field_is_asked_for_over_http",
    ),
    Bug(
        "without a repetition penalty the prompt travels to the ranks",
        "engine/scheduling/sequence.py",
        "        start = 0 if looks_at_prompt else num_prompt_tokens\n",
        "        start = 0\n",
        "tests/unit/engine/ranks/test_plan_wire.py::test_without_repetition_the_prompt_does_not_travel",
    ),
]
