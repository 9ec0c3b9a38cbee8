"""Bugs of keys, roles, certificates, and of refusals that nobody sees."""

from planted.bug import Bug

KEYS = "tests/unit/test_credentials.py::"
COMMAND = "tests/unit/test_keys_command.py::"
REFUSALS = "tests/component/test_refusals.py::"
CERTIFICATES = "tests/component/test_certificates.py::"
SECRETS = "tests/unit/test_block_identity.py::"

BUGS = [
    Bug(
        "one broken line keeps revoked keys alive",
        "router/credentials.py",
        "        self._keys = keys\n",
        "        self._keys = self._keys if faults else keys\n",
        KEYS + "test_a_broken_line_is_told_and_opens_nothing_and_keeps_no_revoked_key_alive",
    ),
    Bug(
        "a long key file stops every stream",
        "router/credentials.py",
        "        if stamp[SIZE] > INLINE_BYTES:",
        "        if stamp[SIZE] < 0:",
        KEYS + "test_a_long_file_is_read_off_the_loop_and_then_holds",
    ),
    Bug(
        "keys outlive their file",
        "router/credentials.py",
        "LOST_FILE_GRACE_S = 5.0",
        "LOST_FILE_GRACE_S = 5e9",
        KEYS + "test_whoever_comes_first_after_an_hour_without_a_file_is_refused",
    ),
    Bug(
        "of two keys with one name the last opens",
        "router/key_file.py",
        "        if key.name in first_lines:",
        "        if key.name in ():",
        KEYS + "test_of_two_lines_with_one_name_neither_opens",
    ),
    Bug(
        "a key file may be written by anybody",
        "router/key_file.py",
        "    if facts.st_mode & stat.S_IWOTH:",
        "    if facts.st_mode & 0:",
        KEYS + "test_a_file_that_anybody_may_write_is_refused_at_start",
    ),
    Bug(
        "a key never ends",
        "router/credentials.py",
        " and entry.expires_at > self._wall_s()",
        "",
        KEYS + "test_a_key_ends_at_its_time",
    ),
    Bug(
        "a change of permissions is not seen",
        "router/key_file.py",
        "facts.st_mtime_ns, facts.st_ctime_ns",
        "facts.st_mtime_ns",
        KEYS + "test_without_a_readable_file_keys_hold_for_a_moment_and_then_none_does",
    ),
    Bug(
        "every tenant is an operator",
        "router/identities.py",
        "        if right not in RIGHTS[self.role]:",
        "        if right not in Right:",
        REFUSALS + "test_each_key_reaches_the_routes_of_its_role_and_no_other",
    ),
    Bug(
        "a route of the operator asks for any key",
        "router/openai_door.py",
        '("/replicas", door.replicas, observe)',
        '("/replicas", door.replicas, Right.ANY_KEY)',
        REFUSALS + "test_each_key_reaches_the_routes_of_its_role_and_no_other",
    ),
    Bug(
        "a scraper's key generates over gRPC",
        "router/grpc_guard.py",
        "            call.identity.check(RIGHTS.get(details.method, Right.GENERATE))\n",
        "",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "equal ids of two tenants meet",
        "core/types.py",
        "        return self.tenant, self.request_id",
        '        return "", self.request_id',
        REFUSALS + "test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone",
    ),
    Bug(
        "equal ids of two tenants draw equal answers",
        "router/request_making.py",
        "seed_of(request_id, self._seed_key, wish.identity.tenant)",
        "seed_of(request_id, self._seed_key)",
        REFUSALS + "test_equal_ids_and_prompts_of_two_tenants_draw_unequal_answers",
    ),
    Bug(
        "the seed key is a public word",
        "cluster/cluster_key.py",
        "found[name] = found[name] or secrets.token_urlsafe(KEY_BYTES)",
        'found[name] = found[name] or "baton"',
        SECRETS + "test_secrets_of_a_cluster_are_made_if_there_are_none_and_never_shown",
    ),
    Bug(
        "refused calls leave no line",
        "router/service.py",
        "            self._log.call_refused(call)",
        "            pass",
        REFUSALS + "test_every_refusal_over_http_is_one_line_and_one_count",
    ),
    Bug(
        "refused calls are not counted",
        "router/service.py",
        "        self.telemetry.call_refused(call)\n",
        "",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "a double leaves no line",
        "router/orchestrator.py",
        "            self.on_refused(request, error)",
        "            pass",
        REFUSALS + "test_equal_ids_of_two_tenants_run_beside_each_other_and_end_alone",
    ),
    Bug(
        "a message too long for gRPC leaves no line",
        "router/grpc_guard.py",
        "        if not call.is_read:\n",
        "        if not call:\n",
        REFUSALS + "test_every_refusal_over_grpc_is_one_line_and_one_count",
    ),
    Bug(
        "a request that ran is told twice",
        "router/service.py",
        "            self._log.request_ended(run.request, ended, call)\n"
        "        if call is not None:\n            call.is_told = True\n",
        "            self._log.request_ended(run.request, ended, call)\n",
        REFUSALS + "test_every_refusal_over_http_is_one_line_and_one_count",
    ),
    Bug(
        "strangers decide how fast the log grows",
        "router/request_log.py",
        "        if self._allowed < 1:",
        "        if self._allowed < -9e9:",
        REFUSALS + "test_strangers_cannot_fill_the_log_and_hide_no_tenants_line",
    ),
    Bug(
        "whatever code there is becomes a label",
        "router/telemetry.py",
        'label = code if code in REFUSAL_CODES else "other"',
        "label = code",
        REFUSALS + "test_nothing_that_a_client_writes_breaks_a_line_or_adds_a_label",
    ),
    Bug(
        "good keys are slowed by bad ones",
        "router/http_guard.py",
        "            try:\n                call.identity",
        "            try:\n                await self._bad_keys.hold(call.address)\n"
        "                call.identity",
        REFUSALS + "test_many_wrong_keys_are_slowed_and_counted_and_a_good_one_never_is",
    ),
    Bug(
        "wrong keys are never slowed over gRPC",
        "router/grpc_guard.py",
        "                await self._keeper.bad_keys.hold(call.address)",
        "                pass",
        REFUSALS + "test_many_wrong_keys_are_slowed_and_counted_and_a_good_one_never_is",
    ),
    Bug(
        "the table of addresses has no bound",
        "router/bad_keys.py",
        "        if len(self._mistakes) > MAX_ADDRESSES:",
        "        if not self._mistakes:",
        REFUSALS + "test_mistakes_are_forgiven_and_the_table_of_addresses_is_bounded",
    ),
    Bug(
        "every address of a /64 has mistakes of its own",
        "router/calls.py",
        "    return str(ipaddress.ip_network((found, 64), strict=False))",
        "    return str(found)",
        REFUSALS + "test_mistakes_are_forgiven_and_the_table_of_addresses_is_bounded",
    ),
    Bug(
        "the HTTP door keeps its first certificate",
        "router/door_certificate.py",
        "            connection.context = newest",
        "            connection.context = door",
        CERTIFICATES + "test_the_http_door_takes_up_a_new_certificate",
    ),
    Bug(
        "the gRPC door keeps its first certificate",
        "router/door_certificate.py",
        "            if version == given:",
        "            if version >= given:",
        CERTIFICATES + "test_the_grpc_door_takes_up_a_new_certificate",
    ),
    Bug(
        "who dials keeps its first certificate",
        "kv_transfer/grpc_network.py",
        "        self.files.refresh()\n        files",
        "        files",
        CERTIFICATES
        + "test_the_inside_takes_up_new_certificates_where_it_listens_and_where_it_dials",
    ),
    Bug(
        "half a pair is taken up",
        "router/door_certificate.py",
        "        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._chain, self._key)\n",
        "",
        CERTIFICATES + "test_a_pair_that_does_not_fit_is_told_once_and_the_old_one_stays",
    ),
    Bug(
        "two who change the key file undo one another",
        "router/key_file.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX)\n",
        "",
        COMMAND + "test_two_who_change_the_file_take_turns",
    ),
    Bug(
        "a broken line keeps a key from being taken back",
        "router/key_file.py",
        '"errors": "surrogateescape"',
        '"errors": "strict"',
        COMMAND + "test_a_key_is_taken_back_whatever_else_is_in_the_file",
    ),
    Bug(
        "a replaced key lives for ever",
        "cluster/keys_cli.py",
        "with_expiry(old, ends_at).text()",
        "old.text()",
        COMMAND + "test_a_key_is_replaced_by_one_of_the_same_rights_and_ends_after_a_while",
    ),
    Bug(
        "keys cross the network in the clear without a word",
        "cluster/up.py",
        "    if is_readable and not",
        "    if not is_readable and not",
        KEYS + "test_keys_that_cross_a_network_in_the_clear_are_warned_of_by_name",
    ),
]
