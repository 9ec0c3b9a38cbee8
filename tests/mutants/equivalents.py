"""Mutants that change nothing anyone can see, each with the reason.

Known by path and lines, so that the list survives edits elsewhere in a file. Called by the command.
"""

from mutants.plan import Equivalent

EQUIVALENTS: list[Equivalent] = [
    Equivalent(
        "kv_transfer/sender.py",
        "LAST_SUB_ATTEMPT = (1 << 16) - 1",
        "LAST_SUB_ATTEMPT = (2 << 16) - 1",
        "it stands for all sub-attempts, and is never sent: any number above them does",
    ),
    Equivalent(
        "router/attempts.py",
        "age_s=max(0.0, self._clock.now_s() - run.timeline.received_at),",
        "age_s=max((-1.0), self._clock.now_s() - run.timeline.received_at),",
        "one clock, which does not go back: the difference is never negative",
    ),
    Equivalent(
        "router/text/detokenizing.py",
        "others = [b for b in range(256) if b not in printable]",
        "others = [b for b in range(255) if b not in printable]",
        "byte 255 is printable, so it is not among the others either way",
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
        "kv_transfer/sender.py",
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
        "engine/scheduling/scheduler.py",
        "return False",
        "return None",
        "`_start` and nothing else here says False, and who calls it only asks whether it is true",
    ),
    Equivalent(
        "router/text/detokenizing.py",
        "CONTEXT_TOKENS = 6",
        "CONTEXT_TOKENS = 5",
        "a space needs one shown token before it, a character three bytes: more change no text",
    ),
    Equivalent(
        "engine/scheduling/block_supply.py",
        "LOOK_AHEAD = 32",
        "LOOK_AHEAD = 31",
        "it bounds the work of a walk, and no number is promised: who is not reached is next time, "
        "as the line moves; that the walk is bounded is tested",
    ),
    Equivalent(
        "worker/attempt.py",
        "left_bytes = room_bytes - num_score_bytes if is_scored else 0",
        "left_bytes = room_bytes - num_score_bytes if is_scored else (-1)",
        "every token has a size, so none fits into no bytes as into less",
    ),
    Equivalent(
        "kv_transfer/agent.py",
        "self._thread.join(timeout=5)",
        "self._thread.join(timeout=6)",
        "the thread was told to end and does so at once; only one that hangs is waited for so "
        "long, and it is a daemon, so it keeps no process either way",
    ),
    Equivalent(
        "worker/attempt.py",
        "return False",
        "return None",
        "`append` alone here says False, and who calls it only asks whether it is true",
    ),
    Equivalent(
        "worker/attempt.py",
        "is_finish_sent: bool = False",
        "is_finish_sent: bool = True",
        "a log begins with its first token, which is unsent, and the delta that takes it says anew "
        "whether the finish was sent",
    ),
]
