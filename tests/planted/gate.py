"""Bugs at the servers: what strangers and single tenants could do
before limits stood in their way."""

from planted.bug import Bug

HEADS = "tests/attacks/test_heads.py"
CONNECTIONS = "tests/attacks/test_connections.py"
BODIES = "tests/attacks/test_bodies.py"
GRPC = "tests/attacks/test_grpc_server.py"
LIMITS = "tests/unit/router/grpc/test_limits.py"
POOL = "tests/unit/router/test_child_pool.py"
BOUNDS = "tests/unit/router/text/test_text_bounds.py"
PARTS = "tests/unit/router/test_admission.py"
INSIDE = "tests/unit/router/http/test_replies.py"

BUGS = [
    Bug(
        "headers have no limit",
        "router/http/server/protocol.py",
        "        if len(self.headers) >= MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:",
        "        if False:",
        f"{HEADS}::test_headers_are_counted",
    ),
    Bug(
        "an unfinished header is gathered",
        "router/http/server/protocol.py",
        "        if self._pending_bytes > MAX_HEAD_BYTES:",
        "        if False:",
        f"{HEADS}::test_trailers_have_the_limit_too",
    ),
    Bug(
        "no time is set for the head",
        "router/http/server/protocol.py",
        "        elif self._is_in_head and self._head_timer is None:",
        "        elif False:",
        f"{HEADS}::test_the_next_head_is_due_in_time_too",
    ),
    Bug(
        "an upgrade leaves a connection that answers nothing more",
        "router/http/server/protocol.py",
        "            self.cycle.keep_alive = False",
        "            pass",
        f"{HEADS}::test_an_upgrade_is_answered_as_the_request_it_also_is",
    ),
    Bug(
        "a request whose client left is answered into a closed socket",
        "router/http/server/protocol.py",
        "                cycle.disconnected = True\n",
        "                pass\n",
        f"{HEADS}::test_no_request_of_a_client_that_left_is_answered",
    ),
    Bug(
        "any number of requests is read ahead",
        "router/http/server/protocol.py",
        "        if len(self.pipeline) >= MAX_PIPELINED:",
        "        if False:",
        f"{HEADS}::test_pipelined_requests_are_bounded",
    ),
    Bug(
        "who reads nothing stays",
        "router/http/server/protocol.py",
        "        if now_waiting >= waiting:",
        "        if False:",
        f"{HEADS}::test_a_client_that_reads_nothing_is_cut",
    ),
    Bug(
        "a connection is read as far as there is something",
        "router/http/server/listener.py",
        "            return FairReading(http, self._buffer)\n",
        "            return http\n",
        f"{HEADS}::test_one_turn_of_the_loop_parses_a_little_of_a_connection",
    ),
    Bug(
        "a connection is read again in the same turn",
        "router/http/server/fair_reading.py",
        "        if nbytes == len(self._buffer) and",
        "        if False and",
        f"{HEADS}::test_one_turn_of_the_loop_parses_a_little_of_a_connection",
    ),
    Bug(
        "a body that nobody takes is read on in the next turn",
        "router/http/server/fair_reading.py",
        " and not flow.read_paused:",
        ":",
        f"{HEADS}::test_a_body_that_nobody_takes_is_not_read_on",
    ),
    Bug(
        "who reads slowly is cut",
        "router/http/server/protocol.py",
        "        if now_waiting >= waiting:",
        "        if True:",
        f"{HEADS}::test_a_client_that_reads_slowly_is_not",
    ),
    Bug(
        "a newcomer is turned away while others idle",
        "router/http/server/connections.py",
        "        for candidates in (self._silent, self._idle):",
        "        for candidates in ():",
        f"{CONNECTIONS}::test_silent_connections_make_room",
    ),
    Bug(
        "who works makes room",
        "router/http/server/connections.py",
        "        self._table.mark_busy(self)\n",
        "        pass\n",
        f"{CONNECTIONS}::test_who_works_is_not_displaced_and_liveness_has_a_reserve",
    ),
    Bug(
        "one address may have everything",
        "router/http/server/connections.py",
        "self._by_network[network] >= self._limit_per_address",
        "False",
        f"{CONNECTIONS}::test_one_address_has_a_share",
    ),
    Bug(
        "large bodies are parsed on the loop",
        "router/http/body_reading.py",
        "        if len(data) > SMALL_BYTES:",
        "        if False:",
        f"{BODIES}::test_a_hostile_body_is_refused_elsewhere",
    ),
    Bug(
        "the first large body waits for the process that parses it",
        "cluster/router_process.py",
        "        await self._bodies.start()\n",
        "",
        "tests/component/test_router_start.py"
        "::test_the_processes_beside_a_router_start_with_it_and_end_with_it",
    ),
    Bug(
        "uploads are hoarded",
        "router/http/body_reading.py",
        "        while self.num_bytes > self._limit_bytes:",
        "        while False:",
        f"{BODIES}::test_half_sent_bodies_have_a_limit_together",
    ),
    Bug(
        "an aborted upload is a bug",
        "router/http/body_reading.py",
        "        except ClientDisconnect as error:",
        "        except ZeroDivisionError as error:",
        f"{BODIES}::test_a_client_that_leaves_in_the_middle_is_no_bug",
    ),
    Bug(
        "gRPC messages are built whatever is in them",
        "router/grpc/auth.py",
        "_watched(bounded(handler), call)",
        "_watched(handler, call)",
        f"{GRPC}::test_a_message_with_too_much_in_it_is_refused_before_it_is_built",
    ),
    Bug(
        "a process that ends while it starts is never started again",
        "router/child_pool.py",
        "        for _ in range(NUM_STARTS):\n",
        "        for _ in range(1):\n",
        "tests/unit/router/test_child_pool.py::"
        "test_a_process_that_ends_while_it_starts_is_started_once_more",
    ),
    Bug(
        "half-sent messages are held for as long as their clients like",
        "router/grpc/auth.py",
        "            return handler and self._incoming.handler(handler)\n",
        "            return handler\n",
        f"{GRPC}::test_half_sent_messages_are_given_up_and_whole_ones_answered",
    ),
    Bug(
        "any number of messages may be slow",
        "router/grpc/incoming.py",
        "        if len(self._slow) > MAX_SLOW:\n",
        "        if False:\n",
        f"{GRPC}::test_half_sent_messages_are_given_up_and_whole_ones_answered",
    ),
    Bug(
        "a connection may have any number of streams",
        "router/grpc/server.py",
        '            ("grpc.max_concurrent_streams", MAX_STREAMS),\n',
        "",
        f"{GRPC}::test_streams_of_a_connection_have_a_limit_that_is_announced",
    ),
    Bug(
        "texts are first come, first served",
        "router/fair_queue.py",
        "        found.next_pass = self._served_pass + max(1, round(found.stride * num_turns))\n",
        "",
        f"{POOL}::test_tenants_take_turns",
    ),
    Bug(
        "large texts take every tokenizer",
        "router/child_pool.py",
        "self._max_large = max(1, num_processes - 1)",
        "self._max_large = num_processes",
        f"{POOL}::test_large_orders_leave_one_process_free",
    ),
    Bug(
        "a text whose client left is tokenized to its end",
        "router/child_pool.py",
        "            asyncio.get_running_loop().call_later(ABANDONED_S, work.cancel)\n",
        "",
        f"{POOL}::test_an_order_in_work_is_given_up_soon_after_its_client_left",
    ),
    Bug(
        "a bound is claimed of a tokenizer that drops text",
        "router/text/text_bounds.py",
        'and kind.get("behavior") != "Removed"',
        "",
        f"{BOUNDS}::test_where_text_may_be_dropped_nothing_is_claimed",
    ),
    Bug(
        "one tenant's many requests keep out another's one",
        "router/admission.py",
        "_Waiter(tier, tenant, num_permits, num_tokens, loop.time(), granted)",
        '_Waiter(tier, "", num_permits, num_tokens, loop.time(), granted)',
        f"{PARTS}::test_one_tenants_many_do_not_keep_out_anothers_one",
    ),
    Bug(
        "a request takes one permit whatever its choices",
        "router/permits.py",
        "return max(1, min(num_choices, self.share_of(tier)))",
        "return 1",
        f"{PARTS}::test_a_request_takes_a_permit_for_each_choice",
    ),
    Bug(
        "heavy replies are made on the loop",
        "router/http/sse.py",
        "        if self._reply.is_heavy_batch(events):",
        "        if False:",
        f"{INSIDE}::test_many_log_probabilities_are_made_off_the_loop",
    ),
    Bug(
        "an answer that needs no body closes the connection on which the body comes",
        "router/http/server/protocol.py",
        "            self._body_timer = self.loop.call_later(LINGER_S, self._close_in_order)\n",
        "            self._close_in_order()\n",
        "tests/attacks/test_bodies.py::test_a_body_that_comes_after_the_answer_is_read"
        "_and_the_connection_goes_on",
    ),
    Bug(
        "a number of a gRPC message has no end",
        "router/grpc/limits.py",
        "range(0, 7 * MAX_VARINT_BYTES, 7)",
        "range(0, 7 << 32, 7)",
        f"{LIMITS}::test_a_number_without_end_is_not_put_together",
    ),
    Bug(
        "what stands behind a group is not counted",
        "router/grpc/limits.py",
        "        elif wire not in GROUP:",
        "        else:",
        f"{LIMITS}::test_a_group_hides_nothing_behind_it",
    ),
    Bug(
        "what is malformed in a group ends the count",
        "router/grpc/limits.py",
        "            at = end\n\n\ndef _varint",
        "            return\n\n\ndef _varint",
        f"{LIMITS}::test_a_group_hides_nothing_behind_it",
    ),
    Bug(
        "messages in messages have no limit",
        "router/grpc/limits.py",
        "                if len(within) > MAX_DEPTH:",
        "                if False:",
        f"{LIMITS}::test_depth_costs_neither_stack_nor_memory",
    ),
    Bug(
        "a process granted in the turn in which the time ends is lost",
        "router/child_pool.py",
        "            return await granted\n",
        "            async with asyncio.timeout(self._wait_s):\n"
        "                return await granted\n"
        "        except TimeoutError as error:\n"
        '            raise Overloaded("no process was free") from error\n',
        f"{POOL}::test_a_process_granted_in_the_turn_in_which_the_time_ends_is_not_lost",
    ),
    Bug(
        "half an answer of a process that died is taken for one",
        "router/child_pool.py",
        'line if line.endswith(b"\\n") else b""',
        "line",
        f"{POOL}::test_half_an_answer_is_none",
    ),
    Bug(
        "a large request that leaves the line frees nobody behind it",
        "router/admission.py",
        "            self._grant_next()  # others may",
        "            # others may",
        f"{PARTS}::test_when_a_large_request_leaves_the_line_those_behind_it_get_what_is_free",
    ),
    Bug(
        "trailers are taken for headers",
        "router/http/server/protocol.py",
        "        if self._fault is None and self._is_in_head:",
        "        if self._fault is None:",
        f"{HEADS}::test_trailers_are_no_headers",
    ),
    Bug(
        "each of a host's many IPv6 addresses has a share of connections",
        "router/http/server/connections.py",
        "        network = network_of(address)\n        is_full",
        "        network = address\n        is_full",
        f"{CONNECTIONS}::test_the_addresses_of_one_ipv6_host_share",
    ),
    Bug(
        "an upload whose time has just ended fails the one that needs its place",
        "router/http/body_reading.py",
        "            if not stalest.deadline.expired():",
        "            if True:",
        f"{BODIES}::test_one_whose_time_ends_in_this_very_turn_makes_room_too",
    ),
    Bug(
        "a stranger's message over gRPC is waited for",
        "router/grpc/auth.py",
        "        return grpc.stream_stream_rpc_method_handler(refuse)\n",
        "        return grpc.unary_unary_rpc_method_handler(refuse)\n",
        f"{GRPC}::test_a_strangers_message_is_not_waited_for",
    ),
    Bug(
        "a number that JSON does not have is a bug of the gRPC server",
        "router/grpc/requests.py",
        "    except ValueError as error:  # NaN",
        "    except ZeroDivisionError as error:  # NaN",
        "tests/unit/router/grpc/test_requests.py::test_grpc_requests_without_what_they_need",
    ),
]
