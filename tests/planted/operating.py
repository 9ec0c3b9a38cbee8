"""Bugs of what an operator is told, of the commands that ask a cluster, and of the supply chain."""

from planted.bug import Bug

LOGS = "tests/unit/test_logs.py::"
TOLD = "tests/simulation/test_told.py::"
HERE = "tests/component/test_operating.py::"
HOUSE = "tests/unit/test_house.py::"

BUGS = [
    Bug(
        "a client's words make lines of their own in a text log",
        "core/logs.py",
        "return value if _PLAIN.fullmatch(value) else _json(value)",
        "return value",
        LOGS + "test_what_a_client_wrote_cannot_make_a_line_of_its_own",
    ),
    Bug(
        "a traceback's words make records of their own",
        "core/logs.py",
        'lines += [f"  | {_json(line)[1:-1]}" for line in traceback.splitlines()]',
        'lines += traceback.split("\\n")',
        LOGS + "test_what_a_client_wrote_cannot_make_a_line_of_its_own",
    ),
    Bug(
        "a key that a client sends as an id is logged",
        "core/logs.py",
        "    return _SECRET.sub(",
        "    return text or _SECRET.sub(",
        LOGS + "test_keys_and_passwords_stay_out_whoever_puts_them_in",
    ),
    Bug(
        "a log that nobody reads grows without bound",
        "core/logs.py",
        "queue.Queue(MAX_WAITING_LINES)",
        "queue.Queue()",
        LOGS + "test_a_reader_that_stands_still_blocks_nobody_and_hears_how_much_it_missed",
    ),
    Bug(
        "a line lost on a full disk makes another one",
        "core/logs.py",
        "                self._num_dropped += 1\n                continue\n",
        "                self._num_dropped += 1\n",
        LOGS + "test_a_full_disk_loses_lines_and_nothing_else",
    ),
    Bug(
        "children log in a form of their own",
        "core/logs.py",
        "    os.environ[FORMAT_VARIABLE] = style\n",
        "",
        LOGS + "test_a_process_and_its_children_log_alike_and_end_by_a_bug_in_one_line",
    ),
    Bug(
        "a process that ends by a bug prints a bare stack",
        "core/logs.py",
        "    sys.excepthook = _uncaught\n",
        "",
        LOGS + "test_a_process_and_its_children_log_alike_and_end_by_a_bug_in_one_line",
    ),
    Bug(
        "a worker process dies without a word",
        "cluster/local.py",
        "                _tell_end(seat, child)\n",
        "",
        HERE + "test_a_child_that_dies_or_does_not_start_is_told_of_with_pid_and_reason",
    ),
    Bug(
        "a router process dies without a word",
        "cluster/local.py",
        '            _tell_end(f"router-{seat}", child)\n',
        "",
        HERE + "test_a_router_that_dies_is_told_of",
    ),
    Bug(
        "a router loses a worker without a word",
        "router/worker_link.py",
        "            if self._state is not LinkState.LOST:\n",
        "            if False:\n",
        TOLD + "test_a_worker_that_dies_is_told_of_with_pid_and_reason_and_a_new_one_joins",
    ),
    Bug(
        "a lost worker is told of at every dial",
        "router/worker_link.py",
        "            if self._state is not LinkState.LOST:\n",
        "            if True:\n",
        TOLD + "test_a_worker_that_hangs_is_lost_once_however_often_it_is_dialled",
    ),
    Bug(
        "a session that comes back is a new worker",
        "router/worker_link.py",
        "            self._has_lived = True\n",
        "",
        TOLD + "test_a_session_that_breaks_and_comes_back_is_told_of_both_times",
    ),
    Bug(
        "a store that stays away is told of at every try",
        "prefix_index/mirror.py",
        "if self.num_failures == FAILURES_TO_BREAK:",
        "if self.num_failures >= FAILURES_TO_BREAK:",
        TOLD + "test_a_store_is_told_of_when_it_goes_and_when_it_comes",
    ),
    Bug(
        "load that is shed fills the log",
        "router/shedding.py",
        "        if now_s - self._told_at >= PERIOD_S:",
        "        if True:",
        HERE + "test_load_that_is_shed_is_one_line_in_ten_seconds_with_how_much_that_was",
    ),
    Bug(
        "an empty pool is no problem",
        "router/readiness.py",
        "        if num_ready >= num_configured:",
        "        if num_ready >= 0:",
        TOLD + "test_a_worker_that_dies_is_told_of_with_pid_and_reason_and_a_new_one_joins",
    ),
    Bug(
        "a store that does not answer is no problem",
        "router/readiness.py",
        "        if self.store == STORE_UNREACHABLE:",
        "        if False:",
        TOLD + "test_everything_that_keeps_a_router_from_serving_is_said",
    ),
    Bug(
        "status is well whatever is missing",
        "cluster/status.py",
        '"degraded": 3',
        '"degraded": 0',
        HERE + "test_status_says_every_problem_and_its_exit_code_tells_the_states_apart",
    ),
    Bug(
        "commands speak plain text to a TLS door",
        "cluster/client.py",
        "files = access.grpc_files(addresses) or (None, None, None)",
        "files = (None, None, None)",
        HERE + "test_generate_and_chat_reach_a_door_over_tls_whichever_way_the_authority_is_given",
    ),
    Bug(
        "SSL_CERT_FILE makes every door TLS",
        "cluster/door_access.py",
        'if not doors and not is_told and "https" not in schemes:',
        "if False:",
        HERE + "test_generate_and_chat_reach_a_door_over_tls_whichever_way_the_authority_is_given",
    ),
    Bug(
        "a door that is not believed is tried without end",
        "cluster/door_access.py",
        "            self._check(address)\n",
        "            pass\n",
        HERE + "test_a_door_that_is_not_believed_gets_no_key_and_the_remedy_is_said",
    ),
    Bug(
        "no certificate is shown",
        "client/stream.py",
        "(root_certificates or None, private_key, certificate_chain)",
        "(root_certificates or None,)",
        HERE + "test_a_door_that_asks_for_a_certificate_is_shown_one",
    ),
    Bug(
        "the metric shows the certificate of the start",
        "cluster/certificate_ends.py",
        "        self._tls.files.refresh()\n",
        "",
        HERE + "test_ends_of_all_certificates_are_known_and_follow_a_renewal",
    ),
    Bug(
        "a chain lasts as long as its last certificate",
        "cluster/certificate_ends.py",
        "return min(int(",
        "return max(int(",
        HERE + "test_of_a_chain_the_earliest_end_counts",
    ),
    Bug(
        "the bill of materials leaves out what packages need",
        "cluster/sbom.py",
        "                waiting.append((other, frozenset(requirement.extras)))\n",
        "",
        HOUSE + "test_the_bill_of_materials_has_all_that_a_server_runs_and_who_needs_it",
    ),
]
