"""What ordinary clients send beside a prompt, what becomes of it, and the test that shows it.

Owns the rows of one table. Called by `benchmarks.compatibility`.
"""

MAKING = "test_request_making"
DOOR = "test_openai_door"
LOGPROBS = "test_logprobs"
UNCHUNKED = "test_a_client_of_http_1_0_gets_no_chunks_and_the_end_is_the_connections"
PINGS = "test_a_client_that_pings_every_second_on_a_quiet_stream_is_not_sent_away"
ROWS = (
    ("`top_p: 0`", "guidance, TaskWeaver", "accepted: greedy",
     f"{MAKING}::test_top_p_0_is_greedy_and_empty_stops_are_none"),
    ("`seed` below 0", "clients for which -1 is a seed", "accepted: a seed as any other",
     f"{MAKING}::test_seeds_are_any_64_bits_and_reach_the_workers_without_a_sign"),
    ("`best_of` equal to `n`", "LangChain's `OpenAI`", "accepted",
     f"{MAKING}::test_as_many_as_n_are_the_best_and_no_others"),
    ("`best_of` above `n`", "older completion clients", "refused by name: nothing is ranked",
     f"{MAKING}::test_as_many_as_n_are_the_best_and_no_others"),
    ('`stop: ""`, `stop: [""]`', "clients that send every field", "accepted: no stop",
     f"{MAKING}::test_top_p_0_is_greedy_and_empty_stops_are_none"),
    ("`max_tokens: 5.0` and other whole floats", "clients without integers",
     "accepted: 5", f"{MAKING}::test_whole_numbers_may_come_as_floats_and_options_as_null"),
    ("`stream_options: {include_usage: null}`", "clients that send every field",
     "accepted: off", f"{MAKING}::test_whole_numbers_may_come_as_floats_and_options_as_null"),
    ("parts `text`, `input_text`, `output_text`, `refusal`", "agents that replay a history",
     "accepted: text", f"{MAKING}::test_parts_of_a_message_are_text_by_any_of_its_names"),
    ("parts with images, sound, files", "multimodal clients", "refused by name",
     f"{MAKING}::test_parts_of_a_message_are_text_by_any_of_its_names"),
    ("`store`, `service_tier`, `verbosity`, `user`, `metadata`", "openai SDKs",
     "accepted, change no token", f"{MAKING}::test_unknown_harmless_refused_and_renamed_fields"),
    ("`prompt_cache_key`, `session_id`", "openai SDKs, agents",
     "prefer the workers that the same key of the same tenant used before",
     f"{MAKING}::test_hints_of_the_cache_steer_and_keep"),
    ("`prompt_cache_retention`", "openai SDKs",
     "`24h`: evicted after others, within the tenant's share; `in_memory`: like any other",
     f"{MAKING}::test_hints_of_the_cache_steer_and_keep"),
    ("`tools` with `tool_choice: none`", "agents in their last turn",
     "ignored and listed in `x-baton-ignored-params`; the template sees no tools",
     f"{MAKING}::test_tools_that_may_not_be_called_are_ignored_and_told_of"),
    ("`tools` that may be called", "agents", "refused by name: not built",
     f"{MAKING}::test_tools_that_may_not_be_called_are_ignored_and_told_of"),
    ("fields nobody knows", "-", "ignored and listed, or refused with `router.strict`",
     f"{MAKING}::test_unknown_harmless_refused_and_renamed_fields"),
    ("a completion near the limit, no `max_tokens`", "clients that name no length",
     "accepted: the default of 16 shrinks to what fits",
     f"{MAKING}::test_a_completion_that_names_no_length_shrinks_to_what_fits"),
    ("more tokens than the context window", "LiteLLM, LangChain, CrewAI",
     "refused in OpenAI's words, `context_length_exceeded`",
     f"{MAKING}::test_what_is_too_long_is_refused_in_the_words_that_clients_look_for"),
    ("`logprobs: k`", "lm-eval, openai SDKs",
     "k alternatives and the drawn token, which may be one more; equal texts stay apart",
     f"{LOGPROBS}::test_the_drawn_token_is_among_its_rivals_and_comes_last"),
    ("`x-request-id`", "Envoy, Istio, LiteLLM",
     "echoed and logged; equal ones are different requests",
     f"{DOOR}::test_equal_trace_ids_are_different_requests_and_are_echoed_and_logged"),
    ("`idempotency-key`", "openai SDKs, if asked to",
     "the request's id: one at a time, the same randomness",
     f"{DOOR}::test_equal_idempotency_keys_are_one_request_with_one_randomness"),
    ("`HEAD` on `/health` and every other path with `GET`", "uptime monitors", "accepted",
     f"{DOOR}::test_what_may_be_read_may_be_asked_for_without_its_body"),
    ("CORS", "browsers", "off; `router.cors_origins` lists the origins that may call",
     f"{DOOR}::test_a_preflight_is_answered_before_the_key_and_opens_nothing"),
    ("HTTP/1.0", "nginx by default, ab", "no chunks: the connection ends the reply",
     f"test_http_versions::{UNCHUNKED}"),
    ("gRPC keep-alive pings", "gRPC libraries, if asked to", "accepted, down to every half second",
     f"test_grpc_pings::{PINGS}"),
)  # fmt: skip
"""What is sent, by whom, what becomes of it, and the test."""
