"""Bugs of keys, roles, certificates, and of refusals that nobody sees."""

from planted.bug import Bug

KEYS = "tests/unit/router/access/test_credentials.py::"
COMMAND = "tests/unit/cli/test_keys.py::"
REFUSALS = "tests/component/test_refusals.py::"
CERTIFICATES = "tests/component/test_certificates.py::"
HOUSE = "tests/repository/test_rules.py::"

BUGS = [
    Bug(
        "one broken line keeps revoked keys alive",
        "router/access/credentials.py",
        "        self._keys = keys\n",
        "        self._keys = self._keys if faults else keys\n",
        KEYS + "test_a_broken_line_is_told_and_opens_nothing_and_keeps_no_revoked_key_alive",
    ),
    Bug(
        "a long key file stops every stream",
        "router/access/credentials.py",
        "        if stamp[SIZE] > INLINE_BYTES:",
        "        if stamp[SIZE] < 0:",
        KEYS + "test_a_long_file_is_read_off_the_loop_and_then_holds",
    ),
    Bug(
        "keys outlive their file",
        "router/access/credentials.py",
        "LOST_FILE_GRACE_S = 5.0",
        "LOST_FILE_GRACE_S = 5e9",
        KEYS + "test_whoever_comes_first_after_an_hour_without_a_file_is_refused",
    ),
    Bug(
        "of two keys with one name the last opens",
        "router/access/key_file.py",
        "        if key.name in first_lines:",
        "        if key.name in ():",
        "tests/unit/router/access/test_key_file.py::test_of_two_lines_with_one_name_neither_opens",
    ),
    Bug(
        "a key file may be written by anybody",
        "router/access/key_file.py",
        "    if facts.st_mode & stat.S_IWOTH:",
        "    if facts.st_mode & 0:",
        "tests/unit/router/access/test_key_file.py::"
        "test_a_file_that_anybody_may_write_is_refused_at_start",
    ),
    Bug(
        "a key never ends",
        "router/access/credentials.py",
        " and entry.expires_at > self._wall_s()",
        "",
        KEYS + "test_a_key_ends_at_its_time",
    ),
    Bug(
        "a change of permissions is not seen",
        "router/access/key_file.py",
        "facts.st_mtime_ns, facts.st_ctime_ns",
        "facts.st_mtime_ns",
        KEYS + "test_without_a_readable_file_keys_hold_for_a_moment_and_then_none_does",
    ),
    Bug(
        "every tenant is an operator",
        "router/access/identities.py",
        "        return right in RIGHTS[self.role]\n",
        "        return right in Right\n",
        REFUSALS + "test_each_key_reaches_the_routes_of_its_role_and_no_other",
    ),
    Bug(
        "a route of the operator asks for any key",
        "router/http/app.py",
        '("/replicas", HttpApi.replicas, Right.OBSERVE)',
        '("/replicas", HttpApi.replicas, Right.ANY_KEY)',
        REFUSALS + "test_each_key_reaches_the_routes_of_its_role_and_no_other",
    ),
    Bug(
        "a scraper's key generates over gRPC",
        "router/grpc/auth.py",
        "            call.identity.check(RIGHTS.get(details.method, Right.GENERATE))\n",
        "",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "equal ids of two tenants meet",
        "core/types.py",
        "        return self.tenant, self.request_id",
        '        return "", self.request_id',
        "tests/component/test_tenants.py::"
        "test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone",
    ),
    Bug(
        "equal ids of two tenants draw equal answers",
        "router/request_builder.py",
        "seed_of(request_id, self._seed_key, params.identity.tenant)",
        "seed_of(request_id, self._seed_key)",
        "tests/component/test_tenants.py::"
        "test_equal_ids_and_prompts_of_two_tenants_draw_unequal_answers",
    ),
    Bug(
        "the seed key is a public word",
        "cluster/secrets.py",
        "found[name] = found[name] or secrets.token_urlsafe(KEY_BYTES)",
        'found[name] = found[name] or "baton"',
        "tests/unit/cluster/test_secrets.py::"
        "test_secrets_of_a_cluster_are_made_if_there_are_none_and_never_shown",
    ),
    Bug(
        "refused calls leave no line",
        "router/observe/recorder.py",
        "            self._log.call_refused(call)",
        "            pass",
        REFUSALS + "test_every_refusal_over_http_is_one_line_and_one_count",
    ),
    Bug(
        "refused calls are not counted",
        "router/observe/recorder.py",
        "        self._telemetry.call_refused(call)\n",
        "",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "a double leaves no line",
        "router/orchestrator.py",
        "            self._observer.request_refused(request, error)",
        "            pass",
        "tests/component/test_tenants.py::"
        "test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone",
    ),
    Bug(
        "a message too long for gRPC leaves no line",
        "router/grpc/auth.py",
        "        if not call.is_read:\n",
        "        if not call:\n",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "a request that ran is told twice",
        "router/observe/recorder.py",
        "            self._log.request_ended(run.request, ended, call)\n"
        "        if call is not None:\n            call.is_recorded = True\n",
        "            self._log.request_ended(run.request, ended, call)\n",
        REFUSALS + "test_every_refusal_over_http_is_one_line_and_one_count",
    ),
    Bug(
        "strangers decide how fast the log grows",
        "router/observe/request_log.py",
        "        if self._allowed < 1:",
        "        if self._allowed < -9e9:",
        REFUSALS + "test_strangers_cannot_fill_the_log_and_hide_no_tenants_line",
    ),
    Bug(
        "whatever code there is becomes a label",
        "router/observe/telemetry.py",
        "label = code if code in CODES else OTHER.code",
        "label = code",
        REFUSALS + "test_nothing_that_a_client_writes_breaks_a_line_or_adds_a_label",
    ),
    Bug(
        "a server refuses in a word that the reference does not have",
        "router/http/server/protocol.py",
        "self._on_refused(SILENT.code, ",
        'self._on_refused("mute", ',
        HOUSE + "test_the_servers_refuse_with_codes_of_the_reference",
    ),
    Bug(
        "good keys are slowed by bad ones",
        "router/http/auth.py",
        "            try:\n                call.identity",
        "            try:\n                await self._bad_keys.hold(call.address)\n"
        "                call.identity",
        "tests/component/test_wrong_keys.py::"
        "test_many_wrong_keys_are_slowed_and_counted_and_a_good_one_never_is",
    ),
    Bug(
        "wrong keys are never slowed over gRPC",
        "router/grpc/auth.py",
        "                await self._service.bad_keys.hold(call.address)",
        "                pass",
        "tests/component/test_wrong_keys.py::"
        "test_many_wrong_keys_are_slowed_and_counted_and_a_good_one_never_is",
    ),
    Bug(
        "the table of addresses has no bound",
        "router/access/bad_keys.py",
        "        if len(self._mistakes) > MAX_ADDRESSES:",
        "        if not self._mistakes:",
        "tests/component/test_wrong_keys.py::"
        "test_mistakes_are_forgiven_and_the_table_of_addresses_is_bounded",
    ),
    Bug(
        "every address of a /64 has mistakes of its own",
        "router/calls.py",
        "    return str(ipaddress.ip_network((found, 64), strict=False))",
        "    return str(found)",
        "tests/component/test_wrong_keys.py::"
        "test_mistakes_are_forgiven_and_the_table_of_addresses_is_bounded",
    ),
    Bug(
        "the HTTP server keeps its first certificate",
        "router/access/certificate.py",
        "            connection.context = newest",
        "            connection.context = first",
        CERTIFICATES + "test_the_http_server_takes_up_a_new_certificate",
    ),
    Bug(
        "the gRPC server keeps its first certificate",
        "router/access/certificate.py",
        "            if version == given:",
        "            if version >= given:",
        CERTIFICATES + "test_the_grpc_server_takes_up_a_new_certificate",
    ),
    Bug(
        "who dials keeps its first certificate",
        "transport/grpc_credentials.py",
        "        self.files.refresh()\n        files",
        "        files",
        CERTIFICATES
        + "test_the_inside_takes_up_new_certificates_where_it_listens_and_where_it_dials",
    ),
    Bug(
        "half a pair is taken up",
        "router/access/certificate.py",
        "        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)\n",
        "",
        CERTIFICATES + "test_a_pair_that_does_not_fit_is_told_once_and_the_old_one_stays",
    ),
    Bug(
        "two who change the key file undo one another",
        "router/access/key_file.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX)\n",
        "",
        COMMAND + "test_two_who_change_the_file_take_turns",
    ),
    Bug(
        "a broken line keeps a key from being taken back",
        "router/access/key_file.py",
        '"errors": "surrogateescape"',
        '"errors": "strict"',
        COMMAND + "test_a_key_is_taken_back_whatever_else_is_in_the_file",
    ),
    Bug(
        "a replaced key lives for ever",
        "cli/keys.py",
        "with_expiry(old, ends_at).text()",
        "old.text()",
        COMMAND + "test_a_key_is_replaced_by_one_of_the_same_rights_and_ends_after_a_while",
    ),
    Bug(
        "keys cross the network in the clear without a word",
        "cli/up.py",
        "    if is_readable and not",
        "    if not is_readable and not",
        KEYS + "test_keys_that_cross_a_network_in_the_clear_are_warned_of_by_name",
    ),
    Bug(
        "a pair that could not be read for a moment is never taken up",
        "core/certificate_files.py",
        "            self._reported = stamp\n",
        "            self._stamp = self._reported = stamp\n",
        CERTIFICATES + "test_a_pair_that_could_not_be_read_for_a_moment_is_taken_up_later",
    ),
    Bug(
        "a key is taken back from a copy of the file that a link names",
        "router/access/key_file.py",
        "    path = path.resolve()\n",
        "",
        COMMAND + "test_a_key_is_taken_back_from_the_file_behind_a_link",
    ),
    Bug(
        "a new key may have the name of another",
        "cli/keys.py",
        "        if _first(line) not in held:",
        "        if True:",
        COMMAND + "test_a_new_key_never_has_the_name_of_another",
    ),
    Bug(
        "a line that was cut off opens",
        "router/access/key_file.py",
        '        lines.append(rest if rest.startswith("#") else rest + _CUT_OFF)',
        "        lines.append(rest)",
        "tests/unit/router/access/test_key_file.py::"
        "test_a_line_that_was_cut_off_opens_nothing_and_harms_no_other",
    ),
    Bug(
        "a change of the file completes a line that was cut off",
        "router/access/key_file.py",
        "lines = _lines_of(file.read())",
        "lines = file.read().splitlines()",
        COMMAND + "test_a_line_that_was_cut_off_stays_refused_whatever_is_changed",
    ),
    Bug(
        "a date beyond the calendar in UTC is taken, and keys cannot be listed",
        "router/access/key_file.py",
        "moment.astimezone(UTC) if moment.tzinfo else",
        "moment if moment.tzinfo else",
        COMMAND + "test_a_date_that_no_calendar_has_closes_its_own_line_alone",
    ),
]
