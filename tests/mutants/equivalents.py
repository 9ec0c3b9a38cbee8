"""Mutants that change nothing anyone can see, each with the reason.

Known by path and lines, so that the list survives edits elsewhere in a file. Called by the command.
"""

from collections.abc import Iterator

from support.tree import ROOT

from mutants.operators import mutants_of
from mutants.plan import Equivalent

PREFIX = 'RequestId(""), "", token_ids, SamplingParams()'
NEAR_SPEED = "tokens_per_s = self._tokens_per_s.get(_are_near({}), DEFAULT_TOKENS_PER_S)"
EQUIVALENTS: list[Equivalent] = [
    Equivalent(
        "kv_transfer/sender.py",
        "LAST_SUB_ATTEMPT = (1 << 16) - 1",
        "LAST_SUB_ATTEMPT = (2 << 16) - 1",
        "it stands for all sub-attempts, and is never sent: any number above them does",
    ),
    Equivalent(
        "router/cost.py",
        "if sources is None or self._most_tokens <= cached_tokens:",
        "if sources is None or (self._most_tokens < cached_tokens):",
        "who holds no more than is cached here gains nothing, which is seen below",
    ),
    Equivalent(
        "router/cost.py",
        "if num_gained <= 0:",
        "if (num_gained < 0):",
        "nothing gained saves nothing, and no fetch takes less than that",
    ),
    *(
        Equivalent(
            "kv_transfer/frame_builder.py",
            "self._first_block = 0",
            f"self._first_block = {value}",
            "set when the receiver has reserved, before any block is queued",
        )
        for value in ("1", "(-1)")
    ),
    *(
        Equivalent(
            "kv_transfer/sender.py",
            "self._commit = frames.Commit(sub_attempt, 0, 0, first_tokens, final_choices)",
            f"self._commit = frames.Commit(sub_attempt, {values}, first_tokens, final_choices)",
            "count and checksum are those of the frames that were sent, set when it is sent",
        )
        for values in ("1, 0", "(-1), 0", "0, 1", "0, (-1)")
    ),
    Equivalent(
        "engine/scheduling/step_planner.py",
        "in_turn = heapq.merge(prompts, starting, key=_turn)",
        "in_turn = heapq.merge(starting, prompts, key=_turn)",
        "no two sequences are due at the same place, so there are no ties",
    ),
    Equivalent(
        "router/submits.py",
        "age_s=max(0.0, now_s - run.timeline.received_at),",
        "age_s=max((-1.0), now_s - run.timeline.received_at),",
        "one clock, which does not go back: the difference is never negative",
    ),
    Equivalent(
        "router/text/detokenizing.py",
        "others = [b for b in range(256) if b not in printable]",
        "others = [b for b in range(255) if b not in printable]",
        "byte 255 is printable, so it is not among the others either way",
    ),
    Equivalent(
        "router/text/detokenizing.py",
        "printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]",
        "printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 257)]",
        "256 is no byte, and its letter stands for byte 0, which is written over it",
    ),
    Equivalent(
        "worker/attempts.py",
        "known = max(old.epoch if old else -1, self._tombstones.get(run_id, -1))",
        "known = max(old.epoch if old else -1, self._tombstones.get(run_id, -2))",
        "the other side of the maximum is -1 at least",
    ),
    Equivalent(
        "router/choice_output.py",
        "for size in range(min(len(stop) - 1, len(text)), 0, -1):",
        "for size in range(max(len(stop) - 1, len(text)), 0, -1):",
        "a text that ends with the whole stop string is a match, which was looked for before",
    ),
    Equivalent(
        "engine/scheduling/block_identities.py",
        "num_buckets = 1 << max(num_blocks - 1, 1).bit_length()",
        "num_buckets = 1 << max(num_blocks - 1, 2).bit_length()",
        "two more buckets in a pool of one or two blocks",
    ),
    Equivalent(
        "kv_transfer/frame_builder.py",
        "if len(batch) > most:",
        "if (len(batch) >= most):",
        "an empty rest stays in the queue, adds nothing to the next frame and is not counted",
    ),
    Equivalent(
        "engine/scheduling/sequences.py",
        "self._known_to_ranks.clear()",
        "pass",
        "every sequence was released before, and its key was taken out with it",
    ),
    Equivalent(
        "engine/scheduling/block_supply.py",
        "if victim is None or victim is sequence:",
        "if (victim is sequence):",
        "the sequence itself runs and is not planned yet, so there is always a victim",
    ),
    Equivalent(
        "worker/attempt.py",
        "left_bytes = room_bytes - num_score_bytes if is_scored else 0",
        "left_bytes = room_bytes - num_score_bytes if is_scored else (-1)",
        "every token has a size, so none fits into no bytes as into less",
    ),
    Equivalent(
        "kv_transfer/agent_thread.py",
        "self._thread.join(timeout=5)",
        "self._thread.join(timeout=6)",
        "the thread was told to end and does so at once; only one that hangs is waited for so "
        "long, and it is a daemon, so it keeps no process either way",
    ),
    Equivalent(
        "worker/attempt.py",
        "is_finish_sent: bool = False",
        "is_finish_sent: bool = True",
        "a log begins with its first token, which is unsent, and the delta that takes it says anew "
        "whether the finish was sent",
    ),
    Equivalent(
        "engine/scheduling/block_tables.py",
        "self._add_parent(sequence, sequence.parents, self._pool.identity(block_id))",
        "pass",
        "`register` goes over the hits then, which keep the identities they have: it takes longer",
    ),
    Equivalent(
        "kv_transfer/agent_thread.py",
        "warm()",
        "pass",
        "kernels are compiled when they are first used then: it takes longer, once",
    ),
    Equivalent(
        "router/workers/session.py",
        "self._close_reason = str(group.exceptions[0])",
        "self._close_reason = str(group.exceptions[(-1)])",
        "both directions of a stream broke in one turn, and either says why",
    ),
    Equivalent(
        "router/workers/session.py",
        "hung = WorkerLost(str(group.exceptions[0]))",
        "hung = WorkerLost(str(group.exceptions[(-1)]))",
        "a worker was found silent and stuck in one turn, and either is why it is given up",
    ),
    *(
        Equivalent(
            "engine/scheduling/prefix_blocks.py",
            line.format(value),
            line.format(other),
            "a prefix is never queued or computed: what only queues and steps look at may be any",
        )
        for line, value, others in (
            ("key={},", "0", ("1", "(-1)")),
            ("epoch=Epoch({}),", "0", ("1", "(-1)")),
            ("choices=({},),", "0", ("1", "(-1)")),
            ("arrived_at={},", "0.0", ("1.0", "(-1.0)")),
            (f"{PREFIX}, seed={{}}, deadline_at=0.0, scope=scope", "0", ("1", "(-1)")),
            (f"{PREFIX}, seed=0, deadline_at={{}}, scope=scope", "0.0", ("1.0", "(-1.0)")),
        )
        for other in others
    ),
    *(
        Equivalent(
            "router/prefix_sources.py",
            before,
            after,
            "being near is the same both ways, and only a name for one of two speeds",
        )
        for before, after in (
            ("return source.node == receiver.node", "return (source.node != receiver.node)"),
            (NEAR_SPEED.format("source, receiver"), NEAR_SPEED.format("receiver, source")),
        )
    ),
    Equivalent(
        "router/prefix_sources.py",
        "if known is None or key > known[0]:",
        "if known is None or (key >= known[0]):",
        "of two holders that have as much and are as busy, either will do",
    ),
    Equivalent(
        "router/prefix_sources.py",
        "return self._resting.get(source.incarnation, 0.0) > now_s",
        "return self._resting.get(source.incarnation, (-1.0)) > now_s",
        "a monotonic clock shows no time before 0",
    ),
    *(
        Equivalent(
            "worker/prefix_fetches.py",
            "pool_generation: int = 0",
            f"pool_generation: int = {value}",
            "it is looked at when there is a prefix, and is set together with it",
        )
        for value in ("1", "(-1)")
    ),
    *(
        Equivalent(
            "engine/scheduling/tier_book.py",
            before,
            after,
            "a turn is compared for being the same, and a block is ranked before that",
        )
        for before, after in (
            ("turn: int = 0", "turn: int = 1"),
            ("turn: int = 0", "turn: int = (-1)"),
            ("self._turn += 1", "self._turn += 2"),
        )
    ),
    Equivalent(
        "engine/scheduling/storage_tiers.py",
        "min_uses: int = 1",
        "min_uses: int = 0",
        "a cached block was used once at least",
    ),
    *(
        Equivalent(
            "router/workers/liveness.py",
            f"{name} = 0.0",
            f"{name} = {value}",
            "a stream that begins was heard of, and the first counters have moved",
        )
        for name in ("self._received_at", "self._moved_at")
        for value in ("1.0", "(-1.0)")
    ),
]
TUNED = {
    "engine/scheduling/block_identities.py": "MAX_ROOTS _HASH_BYTES_USED",
    "engine/scheduling/block_supply.py": "MAX_OVERTAKEN LOOK_AHEAD",
    "engine/scheduling/storage_tiers.py": "AHEAD_BLOCKS",
    "engine/scheduling/queues.py": "MAX_UNANSWERED MAX_READY WALK_BATCH",
    "kv_transfer/probing.py": "PROBE_TIMEOUT_S",
    "kv_transfer/receive_agent.py": "MAX_PROBES",
    "kv_transfer/send_agent.py": "TOMBSTONE_S",
    "kv_transfer/parking.py": "MAX_PARKED MAX_PARKED_PER_PEER",
    "prefix_index/publisher.py": "BATCH_S RENEW_S TTL_S FIRST_PAUSE_S MAX_PAUSE_S "
    "MAX_BATCHES_SINCE_WHOLE READ_BLOCKS",
    "prefix_index/view.py": "MAX_ENDED_LIVES",
    "prefix_index/entries.py": "MAX_BATCH_BLOCKS SEGMENT_BLOCKS MAX_SEGMENTS",
    "router/attempts.py": "MAX_MOVES",
    "router/expected_prefixes.py": "MAX_PROMPTS",
    "router/fair_queue.py": "STRIDE",
    "router/prefix_sources.py": "MAX_RESTING",
    "router/text/detokenizing.py": "CONTEXT_TOKENS",
    "router/workers/outbox.py": "MAX_OUTGOING",
    "router/workers/routes.py": "MEASURE_S",
    "router/workers/sessions.py": "MAX_INCOMPATIBLE_PAIRS",
    "worker/attempt.py": "TOKEN_BYTES LOGPROB_BYTES TOP_BYTES DELTA_BYTES ENDED_BYTES "
    "MIN_SHARE_BYTES",
    "worker/attempts.py": "MAX_TOMBSTONES",
    "worker/prefix_fetches.py": "MAX_FETCHES",
    "worker/router_session.py": "FRAME_BYTES",
    "worker/session_server.py": "ROUTER_PATIENCE_S HELLO_TIMEOUT_S MAX_ROUTERS MAX_UNSENT_ENDS",
}
"""Numbers that were chosen and not computed. What happens at each is tested, wherever it lies; one
more or one less would have been as good a choice, and is asked of no test."""


def tuned(path: str, name: str) -> Iterator[Equivalent]:
    """One more and one less, for each number in the line that gives a constant its value."""
    reason = f"{name} is a choice: one more or less is as good, and what happens at it is tested"
    for mutant in mutants_of(path, (ROOT / path).read_text()):
        if mutant.operator == "constant" and mutant.before.startswith(f"{name} = "):
            yield Equivalent(path, mutant.before, mutant.after, reason)


EQUIVALENTS += [
    e for path, names in TUNED.items() for name in names.split() for e in tuned(path, name)
]
