"""Bugs of the inside: strangers let in, words that hold elsewhere, values and peers believed."""

from planted.bug import Bug

CHECKING = "tests/unit/worker/test_checking.py"
RULES = "tests/simulation/test_inside_rules.py"
ATTACKS = "tests/attacks/test_inside.py"
STRANGERS = f"{ATTACKS}::test_strangers_are_refused_at_every_port_counted_and_told"
TAKEN_PORT = f"{ATTACKS}::test_who_takes_over_a_port_is_told_nothing_and_believed_nothing"
SUBMITS = f"{CHECKING}::test_a_submit_that_cannot_be_is_refused_by_its_field"
SHAPES = f"{CHECKING}::test_a_message_without_the_shape_of_one_ends_its_stream_with_one_short_line"

BUGS = [
    Bug(
        "a stranger opens a session",
        "transport/grpc_network.py",
        '        if not proof.is_dialler(str(metadata.get(DIALLER_KEY, ""))):\n',
        "        if False:\n",
        STRANGERS,
    ),
    Bug(
        "a MAC holds at every listener",
        "transport/stream_proof.py",
        "self._names = (method, listener, dialler)",
        "self._names = (method, dialler)",
        STRANGERS,
    ),
    Bug(
        "a refused stream is not counted",
        "transport/grpc_network.py",
        "        self.num_refused += 1\n",
        "",
        STRANGERS,
    ),
    Bug(
        "refused strangers fill the log",
        "transport/grpc_network.py",
        "        if now_s - self._logged_at >= REFUSAL_LOG_PERIOD_S:\n",
        "        if True:\n",
        f"{ATTACKS}::test_a_stranger_cannot_fill_the_log",
    ),
    Bug(
        "who takes over a port is believed",
        "transport/grpc_streams.py",
        "        if self._pending_proof is not None:\n",
        "        if False:\n",
        TAKEN_PORT,
    ),
    Bug(
        "what a dialler showed is good for another listener",
        "transport/grpc_network.py",
        "StreamProof(self._key, self._method, nonce, str(metadata.get(NONCE_KEY",
        'StreamProof(self._key, self._method, "", str(metadata.get(NONCE_KEY',
        STRANGERS,
    ),
    Bug(
        "a worker believes what a router submits",
        "worker/attempts.py",
        "        check_submit(submit, self.vocabulary_size)\n",
        "",
        f"{RULES}::test_a_submit_that_a_router_spoils_ends_its_request_and_no_other",
    ),
    Bug(
        "a token id that the model has not goes on to the rank",
        "worker/checking.py",
        '    _check_tokens("prompt", request.token_ids, vocabulary_size)\n',
        "",
        SUBMITS,
    ),
    Bug(
        "tokens that are said to be there already are believed",
        "worker/checking.py",
        '        _check_tokens("emitted", tokens, vocabulary_size)\n',
        "",
        SUBMITS,
    ),
    Bug(
        "sampling parameters of a router are believed",
        "worker/checking.py",
        "    replace(sampling, stop_token_ids=()).validate(vocabulary_size)\n",
        "",
        SUBMITS,
    ),
    Bug(
        "a prefix cache's scope may be as long as a message",
        "worker/checking.py",
        '    _check_count("scope", request.scope, MAX_SCOPE_CHARACTERS)\n',
        "",
        SUBMITS,
    ),
    Bug(
        "a deadline may be no number",
        "worker/checking.py",
        "    if not math.isfinite(submit.request.deadline_at):\n",
        "    if False:\n",
        SUBMITS,
    ),
    Bug(
        "a request may be as old as it likes and goes first",
        "worker/checking.py",
        '    _check_range("age_s", submit.age_s, 0.0, MAX_AGE_S)\n',
        "",
        SUBMITS,
    ),
    Bug(
        "nothing may be left to compute",
        "worker/checking.py",
        "    if len(set(submit.finished_choices)) == n:\n",
        "    if False:\n",
        SUBMITS,
    ),
    Bug(
        "a hand-over without an id is taken",
        "worker/checking.py",
        "    if submit.task is not Task.LOCAL:\n",
        "    if False:\n",
        SUBMITS,
    ),
    Bug(
        "stops that stand for stop strings are too many",
        "worker/checking.py",
        "MAX_STOP_TOKENS = 2 * MAX_STOP_STRINGS",
        "MAX_STOP_TOKENS = MAX_STOP_STRINGS",
        f"{CHECKING}::test_what_routers_say_is_taken",
    ),
    Bug(
        "an empty bad word ends the step loop",
        "core/types.py",
        'len(word), 1, MAX_BAD_WORD_TOKENS, "has',
        'len(word), 0, MAX_BAD_WORD_TOKENS, "has',
        SUBMITS,
    ),
    Bug(
        "a bad word without tokens reaches a worker",
        "router/request_builder.py",
        "if ids and max(ids) < rows)",
        "if max(ids, default=0) < rows)",
        "tests/unit/router/test_request_builder.py"
        "::test_a_bad_word_that_has_no_tokens_does_not_reach_a_worker",
    ),
    Bug(
        "the first token of a peer is believed",
        "decode_worker/role.py",
        "            check_first_tokens(first_tokens.values(), self._vocabulary_size)\n",
        "            pass\n",
        f"{RULES}::test_first_tokens_that_cannot_be_end_the_attempt_and_no_rank",
    ),
    Bug(
        "a first token brings more likely ones than a frame holds",
        "worker/checking.py",
        "        if len(token.top) > MAX_TOP_LOGPROBS:\n",
        "        if False:\n",
        f"{CHECKING}::test_first_tokens_of_a_hand_over_are_the_models",
    ),
    Bug(
        "a refused newcomer ends the transfer whose id it named",
        "decode_worker/role.py",
        "        if incoming is None or incoming.attempt is not attempt:\n",
        "        if incoming is None:\n",
        f"{RULES}::test_a_transfer_id_that_is_in_use_ends_the_newcomer_alone",
    ),
    Bug(
        "a transfer id is given twice",
        "prefill_worker/role.py",
        "if self.has_transfer(submit.transfer_id):\n",
        "if False:\n",
        f"{RULES}::test_a_transfer_id_that_is_in_use_ends_the_newcomer_alone",
    ),
    Bug(
        "an empty question for parts costs nothing",
        "kv_transfer/frame_builder.py",
        "        if not places:\n",
        "        if False:\n",
        "tests/unit/kv_transfer/test_sender.py::test_whoever_asks_for_no_part_again_is_not_served_further",
    ),
    Bug(
        "an id may be as long as a message",
        "transport/to_worker_codec.py",
        "    if len(text) > MAX_RUN_ID_CHARACTERS:\n",
        "    if False:\n",
        SHAPES,
    ),
    Bug(
        "a message without the shape of one is a bug of ours",
        "transport/session_streams.py",
        "    except (DecodeError, ValueError) as error:\n",
        "    except DecodeError as error:\n",
        SHAPES,
    ),
    Bug(
        "a reconnect may leave choices out",
        "worker/attempt.py",
        "        if num_listed != n:\n",
        "        if False:\n",
        f"{CHECKING}::test_a_reconnect_says_how_far_every_choice_has_come",
    ),
    Bug(
        "ends for a router that does not read pile up",
        "worker/session_server.py",
        "        if len(session.unknown) >= MAX_UNSENT_ENDS:\n",
        "        if False:\n",
        f"{CHECKING}::test_a_router_that_does_not_read_of_ends_is_cut",
    ),
    Bug(
        "a router in wrong hands is as many as it likes",
        "worker/session_server.py",
        "if hello.router_id not in self._sessions and len(self._sessions) >= MAX_ROUTERS:\n",
        "if False:\n",
        f"{CHECKING}::test_routers_have_a_number",
    ),
    Bug(
        "a refusal crosses the first message",
        "transport/grpc_network.py",
        "                await _await_first_message(context)\n",
        "",
        "tests/component/test_certificates.py::"
        "test_a_role_that_may_not_open_a_stream_hears_so_every_time",
    ),
]
