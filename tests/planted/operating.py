"""Bugs of what an operator is told, of the commands that ask a cluster, and of the supply chain."""

from planted.bug import Bug

LOGS = "tests/unit/core/test_logs.py::"
TOLD = "tests/simulation/test_told.py::"
HERE = "tests/component/test_operating.py::"
HOUSE = "tests/repository/test_rules.py::"
LINKS = "tests/unit/router/workers/test_sessions.py::"
KEYS = "tests/unit/router/access/test_credentials.py::"
BANNER = "tests/component/test_banner.py::"
SLOW = "tests/component/test_slow_readers.py::"
MEETING = "tests/component/test_introductions.py::"

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
        "        if is_own or self._lines.qsize() < MAX_WAITING_LINES:",
        "        if True:",
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
        "                _log_end(name, child)\n",
        "",
        HERE + "test_a_child_that_dies_or_does_not_start_is_told_of_with_pid_and_reason",
    ),
    Bug(
        "a router process dies without a word",
        "cluster/local.py",
        '            _log_end(f"router-{index}", child)\n',
        "",
        HERE + "test_a_router_that_dies_is_told_of",
    ),
    Bug(
        "a router loses a worker without a word",
        "router/workers/session.py",
        "            if self._state is not SessionState.LOST and not",
        "            if False and not",
        TOLD + "test_a_worker_that_dies_is_told_of_with_pid_and_reason_and_a_new_one_joins",
    ),
    Bug(
        "a lost worker is told of at every dial",
        "router/workers/session.py",
        "            if self._state is not SessionState.LOST and not",
        "            if not",
        TOLD + "test_a_worker_that_hangs_is_lost_once_however_often_it_is_dialled",
    ),
    Bug(
        "a session that comes back is a new worker",
        "router/workers/session.py",
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
        "router/observe/shedding_log.py",
        "        if now_s - self._logged_at >= PERIOD_S:",
        "        if True:",
        HERE + "test_load_that_is_shed_is_one_line_in_ten_seconds_with_how_much_that_was",
    ),
    Bug(
        "an empty pool is no problem",
        "router/observe/readiness.py",
        "        if num_ready >= num_configured:",
        "        if num_ready >= 0:",
        TOLD + "test_a_worker_that_dies_is_told_of_with_pid_and_reason_and_a_new_one_joins",
    ),
    Bug(
        "a store that does not answer is no problem",
        "router/observe/readiness.py",
        "        if self.store == STORE_UNREACHABLE:",
        "        if False:",
        TOLD + "test_everything_that_keeps_a_router_from_serving_is_said",
    ),
    Bug(
        "status is well whatever is missing",
        "cli/status.py",
        '"degraded": 3',
        '"degraded": 0',
        "tests/component/test_commands_over_tls.py::"
        "test_status_says_every_problem_and_its_exit_code_tells_the_states_apart",
    ),
    Bug(
        "commands speak plain text to a TLS server",
        "cli/client.py",
        "files = access.grpc_files(addresses) or (None, None, None)",
        "files = (None, None, None)",
        "tests/component/test_commands_over_tls.py::"
        "test_generate_and_chat_reach_a_server_over_tls_whichever_way_the_authority_is_given",
    ),
    Bug(
        "SSL_CERT_FILE makes every server TLS",
        "client/endpoints.py",
        'if not private and not has_certificates and "https" not in schemes:',
        "if False:",
        "tests/component/test_commands_over_tls.py::"
        "test_generate_and_chat_reach_a_server_over_tls_whichever_way_the_authority_is_given",
    ),
    Bug(
        "a server that is not believed is tried without end",
        "client/endpoints.py",
        "            self._check(address)\n",
        "            pass\n",
        "tests/component/test_commands_over_tls.py::"
        "test_a_server_that_is_not_believed_gets_no_key_and_the_remedy_is_said",
    ),
    Bug(
        "no certificate is shown",
        "client/stream.py",
        "(root_certificates or None, private_key, certificate_chain)",
        "(root_certificates or None,)",
        "tests/component/test_commands_over_tls.py::"
        "test_a_server_that_asks_for_a_certificate_is_shown_one",
    ),
    Bug(
        "the metric shows the certificate of the start",
        "cluster/certificate_expiry.py",
        "        self._tls.files.refresh()\n",
        "",
        HERE + "test_ends_of_all_certificates_are_known_and_follow_a_renewal",
    ),
    Bug(
        "a chain lasts as long as its last certificate",
        "cluster/certificate_expiry.py",
        "return min(int(",
        "return max(int(",
        HERE + "test_of_a_chain_the_earliest_end_counts",
    ),
    Bug(
        "the bill of materials leaves out what packages need",
        "cli/sbom.py",
        "                waiting.append((other, frozenset(requirement.extras)))\n",
        "",
        HOUSE + "test_the_bill_of_materials_has_all_that_a_server_runs_and_who_needs_it",
    ),
    Bug(
        "metrics know of no problem",
        "router/observe/status.py",
        "return {code: found[code] for code in PROBLEMS}",
        "return dict.fromkeys(PROBLEMS, 0)",
        HERE + "test_metrics_count_what_is_not_as_configured_by_the_words_of_ready",
    ),
    Bug(
        "who is made to log while it logs waits for itself",
        "core/logs.py",
        "queue.SimpleQueue[str | None] = queue.SimpleQueue()",
        "queue.Queue[str | None] = queue.Queue()",
        LOGS + "test_who_is_about_to_log_may_be_made_to_log_at_every_point_of_it",
    ),
    Bug(
        "what cannot be shown is a fault of who tells",
        "core/logs.py",
        "    except Exception:  # noqa: BLE001 - arguments that do not fit, or cannot be shown",
        "    except (TypeError, ValueError):",
        LOGS + "test_what_cannot_be_shown_is_no_fault_of_who_tells",
    ),
    Bug(
        "a key goes wherever a server points",
        "client/endpoints.py",
        "HTTPSHandler(context=self.context), _Stay)",
        "HTTPSHandler(context=self.context))",
        "tests/component/test_commands_over_tls.py::"
        "test_a_key_is_sent_to_nobody_but_the_server_that_was_named",
    ),
    Bug(
        "a name given to the servers' certificate takes the names of the machine itself away",
        "transport/certificates.py",
        "dict.fromkeys((*LOCAL_HOSTS, *hosts))",
        "dict.fromkeys(hosts or LOCAL_HOSTS)",
        BANNER + "test_names_of_the_server_are_added_to_those_of_the_machine_itself",
    ),
    Bug(
        "a certificate for another name is told as an unknown authority",
        "client/endpoints.py",
        'if "is not valid for" in text:',
        'if "" == text:',
        BANNER + "test_a_certificate_for_other_hosts_is_told_by_the_names_it_has",
    ),
    Bug(
        "who gives an authority is told to give one",
        "client/endpoints.py",
        "if self.ca is None:",
        "if text:",
        BANNER + "test_an_authority_that_did_not_sign_is_told_by_its_file",
    ),
    Bug(
        "the command that a cluster shows names a host that its certificate is not for",
        "cli/banner.py",
        "host if bare_host(host) in hosts or not hosts else hosts[0]",
        "host",
        BANNER + "test_the_command_that_is_shown_names_a_host_and_an_authority_that_fit",
    ),
    Bug(
        "a key file is looked at by calls alone",
        "router/service.py",
        "        self.keyring.watch()\n",
        "",
        KEYS + "test_a_router_looks_at_its_key_file_from_start_to_stop",
    ),
    Bug(
        "a lost key file is told late, and with more time than its keys have",
        "router/access/credentials.py",
        "closes_in_s=round(left_s, 1)",
        "closes_in_s=LOST_FILE_GRACE_S",
        KEYS + "test_a_file_is_lost_and_back_though_nobody_calls",
    ),
    Bug(
        "a worker that was told to end is told as one that died",
        "router/workers/session.py",
        "        return self._is_leaving and not self.subscriptions",
        "        return False",
        TOLD + "test_a_worker_that_was_told_to_end_is_no_fault_unless_it_had_failed",
    ),
    Bug(
        "a worker that dies on its way out with requests on it is told as in order",
        "router/workers/session.py",
        "        return self._is_leaving and not self.subscriptions",
        "        return self._is_leaving",
        LINKS + "test_a_worker_that_drains_leaves_in_order_once_no_request_is_left_on_it",
    ),
    Bug(
        "a worker that has failed leaves as if it had been told to",
        "worker/availability.py",
        "return self.is_draining and not self.fatal.done()",
        "return self.is_draining",
        TOLD + "test_a_worker_that_was_told_to_end_is_no_fault_unless_it_had_failed",
    ),
    Bug(
        "a process that was told to end is told as a fault",
        "cluster/local.py",
        "    if child.process.returncode == 0:",
        "    if child.process.returncode is None:",
        HERE + "test_a_process_that_was_told_to_end_is_no_fault",
    ),
    Bug(
        "the server cuts a slow reader and says that it left",
        "router/http/server/protocol.py",
        '                self._running.scope["state"][CUT_STATE] = slow_reader(self._stall_s)\n',
        "                pass\n",
        SLOW + "test_a_client_that_never_reads_is_told_from_one_that_left",
    ),
    Bug(
        "a stream cuts a slow reader and says that it left",
        "router/http/sse.py",
        '            await self._group.close(scope.get("state", {}).get(CUT_STATE, error))\n',
        '            await self._group.close(scope.get("state", {}).get(CUT_STATE))\n',
        SLOW + "test_the_event_stream_itself_cuts_a_reader_that_its_server_does_not",
    ),
    Bug(
        "an answer that nobody reads is a second request",
        "router/observe/recorder.py",
        'outcome = "" if code == SlowReader.code else "rejected"',
        'outcome = "cancelled" if code == SlowReader.code else "rejected"',
        SLOW + "test_a_whole_answer_that_nobody_reads_is_one_request",
    ),
    Bug(
        "the gRPC server cuts a slow reader and says that it left",
        "router/grpc/server.py",
        "                await group.close(error)\n",
        "",
        SLOW + "test_a_client_that_never_reads_is_told_from_one_that_left",
    ),
    Bug(
        "what ended a request that ran is not counted",
        "router/observe/telemetry.py",
        "            self._counters[metrics.ERRORS].add(1, ",
        "            self._counters[metrics.ERRORS].add(0, ",
        SLOW + "test_a_client_that_never_reads_is_told_from_one_that_left",
    ),
    Bug(
        "the doctor asks every run for the same prompts",
        "cli/doctor.py",
        "random.SystemRandom()",
        "random.Random(tokens)",
        MEETING + "test_no_prompt_of_the_doctor_is_in_a_cache_nor_one_of_an_earlier_run",
    ),
    Bug(
        "the doctor's prompts share a cache with everybody's",
        "cli/doctor.py",
        "secrets.token_hex(16)",
        '""',
        MEETING + "test_no_prompt_of_the_doctor_is_in_a_cache_nor_one_of_an_earlier_run",
    ),
    Bug(
        "a cluster that is still starting is not found by `baton down`",
        "cli/up.py",
        "        publish_ports(config.router.http_port, config.router.grpc_port)\n",
        "",
        "tests/component/test_running.py::test_a_cluster_that_is_still_starting_is_found_and_ended",
    ),
    Bug(
        "a pool that no machine has memory for is made, and the start hangs",
        "engine/ranks/shared_kv.py",
        "    if left_bytes is not None and wanted_bytes > left_bytes:",
        "    if left_bytes is None:",
        "tests/unit/engine/ranks/test_shared_kv.py::"
        "test_a_pool_without_memory_is_refused_with_the_largest_that_fits",
    ),
    Bug(
        "Ctrl-C ends a search without what was run",
        "cli/simulate.py",
        "    except KeyboardInterrupt:\n        is_interrupted = True\n",
        "    except ZeroDivisionError:\n        is_interrupted = True\n",
        "tests/simulation/test_trials.py::test_ctrl_c_ends_a_search_with_what_was_run",
    ),
    Bug(
        "a pool that a GPU has no memory for ends its rank without a word",
        "engine/ranks/rank.py",
        "    check_device()  # beside the weights\n",
        "",
        "tests/unit/engine/ranks/test_shared_kv.py::"
        "test_a_pool_without_memory_on_its_gpu_is_refused_before_it_is_made",
    ),
    Bug(
        "what a router cancels has no spans",
        "worker/attempts.py",
        "            if attempt.ended is None:\n                self._trace(attempt)\n",
        "",
        "tests/simulation/test_spans.py::test_an_attempt_that_its_router_cancels_has_its_spans",
    ),
    Bug(
        "a process that is late goes on beside its successor",
        "cluster/local.py",
        "            with contextlib.suppress(ProcessLookupError):\n"
        "                self.process.kill()\n"
        "            raise WorkerLost(\n",
        "            raise WorkerLost(\n",
        HERE + "test_a_child_that_does_not_come_up_is_named_with_the_limit",
    ),
    Bug(
        "a store that does not answer is down for no reason",
        "cluster/redis/client.py",
        'raise StoreFailed(f"Redis did not answer within {limit_s:g} s") from error',
        "raise StoreFailed(str(error)) from error",
        "tests/component/test_mirror.py"
        "::test_a_store_that_does_not_answer_is_told_of_with_the_limit",
    ),
]
