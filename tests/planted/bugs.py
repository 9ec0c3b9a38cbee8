"""Bugs to plant in a copy of the tree, each with what must catch it.

Modelled on the field's failure catalogue: releases forgotten, frees too early, fences dropped, late
writes accepted, numbers reused, clocks misread. `by` is a range of fault-search seeds or a test.
"""

from planted import (
    bench,
    blocks,
    conversation,
    explain,
    fairness,
    gate,
    inside,
    keys,
    load,
    metrics_ports,
    network,
    observing,
    operating,
    own_pools,
    path_choice,
    peer_fetch,
    placement,
    pool,
    prefix,
    prefix_use,
    quotas,
    rank,
    router,
    sampling,
    servers,
    settings,
    shedding,
    storage,
    tenant_classes,
    tenants,
    text,
    tiers,
    traces,
    transfer,
)
from planted.bug import Bug

RULES = "tests/simulation/test_handover_rules.py"
SURVIVAL = "tests/simulation/test_survival_rules.py"
ENDINGS = "tests/simulation/test_ending_rules.py"
LINT = (
    "tests/simulation/"
    "test_trials.py::test_lint_keeps_clocks_threads_and_unordered_iteration_out_of_simulated_code"
)


FIRST = [
    Bug(
        "after a reconnect nothing is sent again",
        "worker/attempt.py",
        '        """After a reconnect: what the router does not list as received is sent again.\n',
        '        return\n        """After a reconnect: what the router does not say it has was '
        "not received.\n",
        "seeds 0-60",
    ),
    Bug(
        "a router's silence is never noticed by a worker",
        "worker/session_server.py",
        "ROUTER_PATIENCE_S = 5.0",
        "ROUTER_PATIENCE_S = 5e9",
        "seeds 0-100",
    ),
    Bug(
        "a stream that was taken over still takes unsent positions",
        "worker/session_server.py",
        '                raise StreamClosed("a newer stream took over")  # what is unsent is its '
        "to send",
        "                pass",
        "seeds 0-400",
    ),
    Bug(
        "a reconnect does not say what it wants",
        "router/workers/session.py",
        "await stream.send(Hello(self._router_id, wanted, number))",
        "await stream.send(Hello(self._router_id, (), number))",
        "seeds 0-60",
    ),
    Bug(
        "repeated messages are taken for new ones",
        "transport/sequenced.py",
        "            self.num_repeats += 1\n            return False",
        "            return True",
        "tests/unit/transport/test_sequenced.py",
    ),
    Bug(
        "a missing message is not missed",
        "transport/sequenced.py",
        '            raise StreamClosed(f"message {self._next} of the stream is missing, '
        '{number} came")',
        "            pass",
        "seeds 0-60",
    ),
    Bug(
        "parked sequences keep their places",
        "engine/scheduling/sequences.py",
        "        return sum(not s.is_out_of_credit for s in self.running)",
        "        return len(self.running)",
        "seeds 0-200",
    ),
    Bug(
        "parked sequences keep their blocks",
        "engine/scheduling/block_supply.py",
        "        return [*unasked, *reversed(parked)]",
        "        return unasked",
        "tests/unit/engine/scheduling/test_scheduler_preemption.py",
    ),
    Bug(
        "a preempted sequence keeps its blocks",
        "engine/scheduling/block_supply.py",
        "        self._sequences.release(sequence)\n        sequence.num_computed_tokens = 0\n",
        "        sequence.num_computed_tokens = 0\n",
        "seeds 0-20",
    ),
    Bug(
        "forks write into shared blocks",
        "engine/scheduling/block_supply.py",
        "if not is_new and self._pool.references(sequence.block_table[index]) == 1:",
        "if not is_new:",
        "seeds 0-40",
    ),
    Bug(
        "blocks in an executing step are freed at once",
        "engine/scheduling/sequences.py",
        "        if self.executing:\n",
        "        if False:\n",
        "tests/unit/engine/scheduling/test_scheduler.py",
    ),
    Bug(
        "a full prefix hit leaves nothing to compute",
        "engine/scheduling/block_tables.py",
        "for index in range((sequence.num_tokens - 1) // self._limits.block_size_tokens):",
        "for index in range(sequence.num_tokens // self._limits.block_size_tokens):",
        "tests/unit/engine/scheduling/test_scheduler.py",
    ),
    Bug(
        "a freed block is forgotten",
        "engine/scheduling/block_pool.py",
        "                    marks.unmark(block_id)\n                    freed.append(block_id)\n",
        "                    marks.unmark(block_id)\n",
        "seeds 0-10",
    ),
    Bug(
        "a slot keeps its generation when it is handed out again",
        "engine/scheduling/block_pool.py",
        "            generations[block_id] += 1\n",
        "            pass\n",
        f"{RULES}::test_a_late_frame_after_the_blocks_are_reused_is_refused",
    ),
    Bug(
        "tenants share blocks",
        "core/block_hash.py",
        "for text in (content_digest, adapter, scope):",
        "for text in (content_digest, adapter):",
        "tests/unit/core/test_block_hash.py::"
        "test_names_depend_on_parent_tokens_scope_model_and_key",
    ),
    Bug(
        "a block is known by its own tokens, not by what came before",
        "core/block_hash.py",
        "        payload = parent + packed[",
        "        payload = packed[",
        "tests/unit/core/test_block_hash.py::"
        "test_names_depend_on_parent_tokens_scope_model_and_key",
    ),
    Bug(
        "damaged KV is taken as it comes",
        "kv_transfer/reserved_blocks.py",
        '        is_good = checksums == entries["checksum"]\n',
        "        is_good = checksums == checksums\n",
        "seeds 0-60",
    ),
    Bug(
        "damaged control messages are believed",
        "kv_transfer/codec.py",
        "        if _head_crc(kind, number, memoryview(data)[_HEAD.size : end]) != crc:",
        "        if False:",
        "tests/unit/kv_transfer/test_frames.py",
    ),
    Bug(
        "a late write lands on blocks of somebody else",
        "kv_transfer/reserved_blocks.py",
        "            if self._generation_of(block_id) != generation:",
        "            if False:",
        f"{RULES}::test_a_late_frame_after_the_blocks_are_reused_is_refused",
    ),
    Bug(
        "a preempted hand-over does not restart",
        "prefill_worker/role.py",
        "            self._post(\n                self.agent.restart, "
        "outgoing.attempt.submit.transfer_id, outgoing.sub_attempt\n            )\n",
        "",
        "seeds 0-200",
    ),
    Bug(
        "anybody may fetch",
        "kv_transfer/send_agent.py",
        "return found if named == (opened.receiver_id, opened.receiver_incarnation) else None",
        "return found",
        f"{RULES}::test_a_fetch_by_a_peer_that_submit_did_not_name_is_refused",
    ),
    Bug(
        "leases never expire",
        "kv_transfer/send_agent.py",
        "                if now_s - sender.last_traffic_at > self._config.lease_s:",
        "                if False:",
        "tests/unit/kv_transfer/test_sender_lease.py::"
        "test_the_owning_routers_traffic_renews_the_lease_and_its_silence_ends_it",
    ),
    Bug(
        "an attempt keeps its epoch",
        "router/attempts.py",
        "            epoch = Epoch(num_faults + num_moves)",
        "            epoch = Epoch(0)",
        "seeds 0-40",
    ),
    Bug(
        "workers are not told to forget",
        "router/workers/session.py",
        "            self._outbox.push(Cancel(run_id, epoch))",
        "            pass",
        "seeds 0-10",
    ),
    Bug(
        "a hung worker is not found",
        "router/workers/liveness.py",
        "HUNG_S = 3.0",
        "HUNG_S = 3e9",
        f"{SURVIVAL}::test_a_hung_worker_is_found_within_four_seconds",
    ),
    Bug(
        "an old epoch is served again",
        "worker/attempts.py",
        "        if submit.epoch <= known:",
        "        if False:",
        f"{ENDINGS}::test_a_submit_with_an_old_epoch_is_dropped",
    ),
    Bug(
        "a Cancel before its Submit is forgotten",
        "worker/attempts.py",
        "        self._tombstones[run_id] = Epoch(max(epoch, self._tombstones.pop(run_id, -1)))\n",
        "",
        f"{ENDINGS}::test_a_cancel_before_its_submit_leaves_a_tombstone",
    ),
    Bug(
        "a cancelled attempt keeps its sequences",
        "worker/attempts.py",
        '        for sequence in attempt.sequences:\n            with contained("the end of a '
        'sequence"):\n'
        "                self.scheduler.cancel(sequence)\n",
        "",
        "seeds 0-20",
    ),
    Bug(
        "positions that came twice are delivered twice",
        "router/choice_output.py",
        "        fresh = delta.token_ids[len(overlap) :]",
        "        fresh = delta.token_ids",
        "seeds 0-60",
    ),
    Bug(
        "a resumed stream begins one token late",
        "router/choice_output.py",
        "        first = min(max(self._skip - known, 0), len(used))",
        "        first = min(max(self._skip - known + 1, 0), len(used))",
        "tests/unit/router/test_resuming.py",
    ),
    Bug(
        "a poisonous request is tried for ever",
        "router/submits.py",
        "DEATHS_BEFORE_ALONE = 2",
        "DEATHS_BEFORE_ALONE = 200",
        f"{SURVIVAL}::test_a_request_of_death_is_quarantined_and_kills_at_most_three",
    ),
    Bug(
        "drained workers keep their requests",
        "worker/worker.py",
        "            if attempt.submit.task is not Task.PREFILL:\n                "
        "self.attempts.end(attempt, moving)\n",
        "            pass\n",
        "tests/simulation/test_drain.py",
    ),
    Bug(
        "leases are kept by the wall clock",
        "worker/session_server.py",
        "import asyncio\n",
        "import asyncio\nimport time\n",
        LINT,
    ),
    Bug(
        "sessions are visited in the order of their hashes",
        "router/workers/sessions.py",
        "for session in self._sessions.values() if session.is_usable",
        "for session in set(self._sessions.values()) if session.is_usable",
        LINT,
    ),
    Bug(
        "any secret opens",
        "router/access/credentials.py",
        "        if not is_right or entry is _DUMMY:",
        "        if entry is _DUMMY:",
        "tests/unit/router/access/test_credentials.py",
    ),
    Bug(
        "what begins like an open path is open",
        "router/http/auth.py",
        'scope["path"] in OPEN_PATHS',
        'scope["path"].startswith(tuple(OPEN_PATHS))',
        "tests/unit/router/http/test_auth.py",
    ),
]

BUGS = [
    *FIRST,
    *bench.BUGS,
    *blocks.BUGS,
    *conversation.BUGS,
    *servers.BUGS,
    *explain.BUGS,
    *fairness.BUGS,
    *gate.BUGS,
    *inside.BUGS,
    *keys.BUGS,
    *load.BUGS,
    *metrics_ports.BUGS,
    *network.BUGS,
    *observing.BUGS,
    *operating.BUGS,
    *own_pools.BUGS,
    *peer_fetch.BUGS,
    *path_choice.BUGS,
    *placement.BUGS,
    *pool.BUGS,
    *prefix.BUGS,
    *prefix_use.BUGS,
    *quotas.BUGS,
    *rank.BUGS,
    *router.BUGS,
    *sampling.BUGS,
    *settings.BUGS,
    *shedding.BUGS,
    *storage.BUGS,
    *tenant_classes.BUGS,
    *text.BUGS,
    *tiers.BUGS,
    *tenants.BUGS,
    *traces.BUGS,
    *transfer.BUGS,
]

UNCAUGHT = {
    "a transfer takes no pins of its own": "on virtual time the agent shares the worker's loop, "
    "so nobody reads a block "
    "between its release and its reuse; it takes threads to show",
}
"""Bugs that were planted and that nothing catches yet, with the reason."""
