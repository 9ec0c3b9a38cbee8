"""Bugs of the hand-over: pools that were replaced, leaks, claims believed, faults lost."""

from planted.bug import Bug

SENDER = "tests/unit/kv_transfer/test_sender.py"
AGENT = "tests/unit/kv_transfer/test_agent.py"
RECEIVER = "tests/unit/kv_transfer/test_receiver.py"
POOL = "tests/simulation/test_pool_rules.py"

BUGS = [
    Bug(
        "a transfer that ended by itself never answers the worker again",
        "kv_transfer/sender.py",
        "            self._callbacks.transfer_drained(self.offer.transfer_id, self._sub_attempt)\n"
        "            return\n",
        "            return\n",
        "tests/unit/kv_transfer/test_sender.py"
        "::test_a_sub_attempt_begun_while_the_transfer_ended_is_drained_too",
    ),
    Bug(
        "a pool that was replaced is read and written all the same",
        "kv_transfer/fenced_pool.py",
        "        if self._kv.generation != self._generation:\n",
        "        if False:\n",
        RECEIVER,
    ),
    Bug(
        "a mapping of a pool that was replaced is served",
        "kv_transfer/fenced_pool.py",
        "        if shared is None or shared.name != mapped_pool:\n",
        "        if False:\n",
        f"{SENDER}::test_a_peer_that_mapped_an_older_pool_is_told_at_once",
    ),
    Bug(
        "frames are built from a pool that was replaced",
        "kv_transfer/frame_builder.py",
        "        self._fence.check()\n",
        "",
        f"{SENDER}::test_no_frame_is_built_from_a_replaced_pool",
    ),
    Bug(
        "KV of a pool that was replaced is attached",
        "decode_worker/role.py",
        "        if incoming.pool_generation != self._kv.generation:\n",
        "        if False:\n",
        f"{POOL}::test_kv_that_arrived_before_the_pool_was_replaced_is_not_attached",
    ),
    Bug(
        "a worker without ranks takes requests in",
        "worker/availability.py",
        "        if not self.is_ready:\n            raise Draining(\n",
        "        if False:\n            raise Draining(\n",
        f"{POOL}::test_nothing_is_taken_in_while_the_ranks_are_down",
    ),
    Bug(
        "an Open that is cut while parked keeps its place",
        "kv_transfer/parking.py",
        "            if not waiting:\n                del self._waiting[transfer_id]\n"
        "            self._by_peer[peer] -= 1\n",
        "            if not waiting:\n                del self._waiting[transfer_id]\n",
        f"{AGENT}::test_an_open_that_is_cut_while_it_waits_gives_its_place_back",
    ),
    Bug(
        "one peer may park as many Opens as all",
        "kv_transfer/parking.py",
        "MAX_PARKED_PER_PEER = 1024",
        "MAX_PARKED_PER_PEER = 4096",
        f"{AGENT}::test_a_peer_that_opens_what_nobody_submitted_takes_no_place_of_others",
    ),
    Bug(
        "a burst finds fewer places than it has hand-overs",
        "kv_transfer/parking.py",
        "MAX_PARKED_PER_PEER = 1024",
        "MAX_PARKED_PER_PEER = 32",
        "tests/simulation/test_handover_rules.py"
        "::test_a_burst_whose_submits_reach_prefill_late_loses_no_attempt",
    ),
    Bug(
        "a second Open takes a transfer over",
        "kv_transfer/send_agent.py",
        "        elif found.has_stream:\n",
        "        elif False:\n",
        f"{AGENT}::test_a_second_open_is_turned_away_and_the_first_goes_on",
    ),
    Bug(
        "a second Starting is obeyed",
        "kv_transfer/receiver.py",
        "        if self._starting is not None:\n",
        "        if False:\n",
        f"{RECEIVER}::test_a_second_starting_ends_the_stream_and_the_worker_reserves_once",
    ),
    Bug(
        "decode reserves as often as it is told to",
        "decode_worker/role.py",
        "        if incoming.sequence.status is not Status.NEW:\n",
        "        if False:\n",
        f"{POOL}::test_decode_reserves_once_whatever_it_is_told",
    ),
    Bug(
        "entries do not count in a frame's length",
        "kv_transfer/frames.py",
        "        count = room // (ENTRY.itemsize + fragment_bytes)\n",
        "        count = frame_bytes // fragment_bytes\n",
        f"{SENDER}::test_a_frame_with_its_entries_is_as_long_as_allowed",
    ),
    Bug(
        "a frame that no transport carries is built",
        "kv_transfer/codec.py",
        "    if num_bytes > MAX_MESSAGE_BYTES:\n",
        "    if False:\n",
        f"{SENDER}::test_what_no_transport_carries_is_refused_where_it_is_made",
    ),
    Bug(
        "the checksum over all parts is not compared",
        "kv_transfer/receiver.py",
        "        if blocks.checksum != commit.checksum:\n",
        "        if False:\n",
        f"{RECEIVER}::test_a_commit_over_other_parts_than_came_is_refused",
    ),
    Bug(
        "a Restart keeps what came",
        "kv_transfer/reserved_blocks.py",
        "        self._is_here[:] = False\n",
        "",
        f"{RECEIVER}::test_a_restart_forgets_what_came_before_it",
    ),
    Bug(
        "a part may hold any number of tokens",
        "kv_transfer/reserved_blocks.py",
        '            & (entries["num_valid_tokens"] <= grid.block_size_tokens)\n',
        "",
        f"{RECEIVER}::test_a_part_cannot_hold_more_tokens_than_its_block",
    ),
    Bug(
        "blocks of an older sub-attempt go out",
        "kv_transfer/sender.py",
        "        if sub_attempt != self._sub_attempt or self.is_closed or self._builder is None:\n",
        "        if self.is_closed or self._builder is None:\n",
        f"{SENDER}::test_what_an_older_sub_attempt_publishes_is_not_sent",
    ),
    Bug(
        "parts are sent again for ever",
        "kv_transfer/frame_builder.py",
        " or self._num_resends > MAX_RESENDS:\n",
        ":\n",
        f"{SENDER}::test_parts_are_sent_again_so_often_and_no_more",
    ),
    Bug(
        "a claim of having the whole prompt is believed",
        "kv_transfer/frame_builder.py",
        "        if have_tokens >= num_tokens or have_tokens % grid.block_size_tokens:\n",
        "        if have_tokens % grid.block_size_tokens:\n",
        f"{SENDER}::test_nobody_has_the_whole_prompt_or_a_part_of_a_block",
    ),
    Bug(
        "an ended transfer leaves no tombstone",
        "kv_transfer/send_agent.py",
        "            self._bury(sender.offer.transfer_id)\n",
        "",
        f"{AGENT}::test_an_open_after_the_end_is_turned_away_at_once",
    ),
    Bug(
        "the router's traffic renews no lease",
        "kv_transfer/send_agent.py",
        "                stream.sender.last_traffic_at = now_s\n",
        "                pass\n",
        "tests/unit/kv_transfer/test_sender_lease.py::"
        "test_the_owning_routers_traffic_renews_the_lease_and_its_silence_ends_it",
    ),
    Bug(
        "a preempted hand-over takes no pins",
        "engine/scheduling/block_supply.py",
        "            pins = self._tables.pin(sequence) if handover.is_read else []\n",
        "            pins: list[int] = []\n",
        f"{POOL}::test_blocks_of_a_preempted_hand_over_are_kept_until_the_agent_has_let_go",
    ),
    Bug(
        "blocks that are written into are not pinned",
        "decode_worker/role.py",
        "        self._closing[transfer_id] = self._scheduler.tables.pin(incoming.sequence)\n",
        "        self._closing[transfer_id] = []\n",
        f"{POOL}::test_blocks_that_are_written_into_are_kept_until_the_agent_has_let_go",
    ),
    Bug(
        "an older sub-attempt that is drained takes all pins along",
        "prefill_worker/role.py",
        "        for drained in [number for number in pins if number <= sub_attempt]:\n",
        "        for drained in list(pins):\n",
        f"{POOL}::test_an_older_sub_attempt_that_is_drained_frees_no_blocks_of_a_later_one",
    ),
    Bug(
        "blocks that decode has are sent too",
        "prefill_worker/role.py",
        "        first = max(outgoing.num_published[layer], handover.first_block)\n",
        "        first = outgoing.num_published[layer]\n",
        f"{POOL}::test_blocks_that_decode_has_are_not_sent_again",
    ),
    Bug(
        "a bug in a posted step of a transfer vanishes",
        "kv_transfer/threadsafe_callbacks.py",
        '            self._fail(transfer_id, failure_of(error, "a step of the transfer"))\n',
        '            failure_of(error, "a step of the transfer")\n',
        f"{POOL}::test_a_bug_in_a_step_of_a_transfer_ends_its_attempt",
    ),
    Bug(
        "a bug where blocks are given back vanishes",
        "kv_transfer/threadsafe_callbacks.py",
        "            on_fault(error)\n",
        "            del error\n",
        f"{POOL}::test_a_bug_where_blocks_are_given_back_ends_the_worker",
    ),
    Bug(
        "a lease watch that broke is not missed",
        "kv_transfer/agent.py",
        "            self._on_fault(error)\n",
        "            pass\n",
        "tests/unit/kv_transfer/test_sender_lease.py::test_a_watch_that_ends_by_a_bug_is_reported",
    ),
    Bug(
        "a bug in a sender is not told",
        "kv_transfer/agent.py",
        "        except Exception as error:  "
        "# noqa: BLE001 - logged, and the attempt is made again\n",
        "        except ServingError as error:\n",
        f"{SENDER}::test_a_bug_in_a_sender_fails_its_transfer_alone",
    ),
    Bug(
        "a commit that crosses with the end of its transfer is reported",
        "kv_transfer/receiver.py",
        "        if self.is_closed:\n            return  # it crossed with the end, "
        "which is on its way to the sender\n",
        "",
        f"{RECEIVER}::test_what_crosses_with_the_end_is_not_reported",
    ),
    Bug(
        "an Ack that crosses with the end of its transfer is reported",
        "kv_transfer/sender.py",
        "        if self.is_closed:\n            return  # it crossed with the end, "
        "which is on its way to the receiver\n",
        "",
        f"{SENDER}::test_an_ack_that_crosses_with_the_end_is_not_reported",
    ),
    Bug(
        "a stream whose Open cannot be sent is left open",
        "kv_transfer/receive_stream.py",
        "            if stream is not None:\n                stream.reset()\n",
        "            pass\n",
        "tests/unit/kv_transfer/test_receiver_faults.py::"
        "test_a_stream_whose_open_cannot_be_sent_is_cut",
    ),
]
